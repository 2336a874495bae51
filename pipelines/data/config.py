"""What data to use: a preparation (records in, Arrow shards out) and the data of a training run."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from molmo_core.config import BaseConfig, ConfigError
from molmo_core.preprocessing.media import MAX_PIXELS as MAX_IMAGE_PIXELS

RecordFormat = Literal["auto", "jsonl", "json", "parquet", "huggingface", "webdataset"]
Format = Literal[RecordFormat, "prepared"]


@dataclasses.dataclass
class TokenizerTraining(BaseConfig):
    """A byte-level BPE tokenizer trained on the text of the records (for models that start from nothing)."""

    vocab_size: int = 512


@dataclasses.dataclass
class PrepareConfig(BaseConfig):
    """`python -m jobs.prepare`: records → preprocessed Arrow shards, a report and the rejected rows."""

    records: str = ""
    """A file, a folder or a glob of records (docs/data.md shows the forms), or `easy-vqa`."""
    output: str = ""
    """Folder of the shards; a second start continues there."""
    model: str = ""
    """Model configuration whose preprocessor and tokenizer are used."""
    format: RecordFormat = "auto"
    tokenizer: TokenizerTraining | None = None
    """Train a tokenizer on the records first and use it instead of that of the model's configuration file. None = the model's own. A
    checkpoint folder always keeps its own: its weights know no other."""
    sequence_length: int | None = None
    """Longest example in tokens: later annotations are dropped first. None = the model's max_sequence_length."""
    shard_rows: int = 256
    """Records of one shard, the unit of work and of restarting."""
    limit: int | None = None
    """Use only the first records."""
    max_reject_rate: float = 0.05
    """Stop when a larger share of the records is unusable."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Larger images are rejected from their header, before anything is decoded. At most the default, which is Pillow's own limit."""
    actors: int | None = None
    """Decode and preprocess actors; None = one a CPU of the cluster."""
    seed: int = 0

    PATHS: ClassVar[tuple[str, ...]] = ("records", "model")

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        if isinstance(data.get("model"), dict):
            raise ConfigError("prepare: model is the path of a configuration or checkpoint; change settings in a copy of that file")
        return data

    def __post_init__(self) -> None:
        least = {"shard_rows": 1, "limit": 1, "actors": 1, "sequence_length": 2, "max_image_pixels": 1, "max_reject_rate": 0}
        for name, value in ((name, getattr(self, name)) for name in least):
            if value is not None and value < least[name]:
                raise ConfigError(f"prepare: {name}={value}: at least {least[name]}")
        if self.max_image_pixels > MAX_IMAGE_PIXELS:
            raise ConfigError(
                f"prepare: max_image_pixels={self.max_image_pixels:,}: at most {MAX_IMAGE_PIXELS:,}, Pillow opens no larger image"
            )

    def require_paths(self) -> None:
        """Raises ConfigError unless records, output and model are given."""
        missing = [name for name in ("records", "output", "model") if not getattr(self, name)]
        if missing:
            raise ConfigError(f"prepare: {', '.join(missing)} must be given, for example {missing[0]}=PATH on the command line")


@dataclasses.dataclass
class DatasetConfig(BaseConfig):
    """One dataset of a training run: a prepared folder, or records that are decoded while training."""

    path: str = ""
    format: Format = "auto"
    """`prepared`: a folder written by `jobs.prepare`; others: records."""
    sampling_size: float | None = None
    """Size that counts in the mixture: None = number of examples, > 1 = this many, however many there are, <= 1 = a share of them."""
    sampling_rate: float = 1.0
    """Factor on this dataset's rate inside its group."""
    message_weight: float | None = None
    """Loss weight of every message, in place of the model's `loss_token_weighting`; the `weight` of a record or an annotation multiplies it
    (in a prepared dataset, where they are one number, it takes the place of both)."""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the preprocessor for this dataset, e.g. `{p_high_res: 0.3, max_frames: 64}`; a prepared one must have been made with
    them."""

    PATHS: ClassVar[tuple[str, ...]] = ("path",)


@dataclasses.dataclass
class GroupConfig(BaseConfig):
    """Datasets that share a fixed part of the mixture; inside it, rates follow the square root of size."""

    weight: float = 1.0
    datasets: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PackingConfig(BaseConfig):
    """Several examples in one sequence, within two budgets: tokens (the sequence length) and crops or frames."""

    buffer_size: int = 48
    """Examples among which each stream chooses what goes together."""
    max_crops: int = 128
    """Crops or frames of one pack."""


@dataclasses.dataclass
class DataConfig(BaseConfig):
    """The data of a training run. Give `datasets` (one group) or `groups`."""

    datasets: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    groups: dict[str, GroupConfig] = dataclasses.field(default_factory=dict)
    packing: PackingConfig | None = None
    shuffle: bool = True
    pad_to_max: bool = False
    """Pad every batch to the sequence length (static shapes for compiled models) instead of its longest row."""
    max_reject_rate: float = 0.01
    """Streamed records: stop when a larger share of the examples of a source (a file), or of all, is unusable."""
    actors: int | None = None
    """Streamed records: decode and preprocess actors of one rank; None = its share of the cluster's CPUs beyond one a rank."""
    prefetch: int = 2
    """Batches that are ready before they are asked for."""

    def __post_init__(self) -> None:
        if bool(self.datasets) == bool(self.groups):
            raise ConfigError("data: give either datasets (one group) or groups")

    def all_groups(self) -> dict[str, GroupConfig]:
        """The groups; a bare `datasets` is a group of its own."""
        return self.groups or {"all": GroupConfig(1.0, self.datasets)}
