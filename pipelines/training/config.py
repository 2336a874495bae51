"""The configuration of a training run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from molmo_core.config import BaseConfig, ConfigError, Count, Dropout, Positive, Seed, Share, Size, Weight, flatten, read_yaml
from molmo_core.registry import BaseModelConfig, config_class
from pipelines.data.config import DataConfig
from pipelines.model_folder import model_folder
from pipelines.training.parallel_config import ParallelConfig

MAX_NAME_BYTES = 200
"""Of a run's name: file systems take 255, and folders beside the run's have longer names."""
Precision = Literal["fp32", "amp_bf16", "bf16"]


@dataclasses.dataclass
class GroupConfig(BaseConfig):
    """Optimiser settings of one part of the model."""

    lr: Weight = 1e-5
    """Peak learning rate of AdamW."""
    warmup: Count = 200
    """Steps from 0 to the peak, linearly."""
    betas: tuple[Dropout, Dropout] = (0.9, 0.95)
    eps: Positive = 1e-6
    weight_decay: Weight = 0.0
    muon_lr: Weight | None = None
    """Peak learning rate of Muon for this part's matrices (all but embeddings and the output head); None = AdamW for them, too."""


@dataclasses.dataclass
class ScheduleConfig(BaseConfig):
    """The learning rates after warmup."""

    name: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    alpha_f: Share = 0.1
    """Share of the peak that `cosine` and `linear` end at."""
    hold: Dropout = 0.0
    """Share of the run (warmup included) that stays at the peak before `cosine` or `linear` begin."""


@dataclasses.dataclass
class OptimConfig(BaseConfig):
    """The optimiser. Defaults are those of the published pre-training."""

    connector: GroupConfig = dataclasses.field(default_factory=lambda: GroupConfig(lr=2e-4, warmup=200))
    vit: GroupConfig = dataclasses.field(default_factory=lambda: GroupConfig(lr=6e-6, warmup=2000))
    llm: GroupConfig = dataclasses.field(default_factory=lambda: GroupConfig(lr=2e-5, warmup=2000))
    pointing: GroupConfig = dataclasses.field(default_factory=lambda: GroupConfig(lr=1e-4, warmup=200))
    """What chooses points (MolmoPoint)."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    max_grad_norm: Positive | None = 1.0
    """Gradients of each part are scaled down to this norm; None = never."""
    muon_momentum: Dropout = 0.95
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How an updated bfloat16 weight is rounded (`precision: bf16`): `nearest` loses every update below 1/512 of the weight, which at
    learning rates about 1e-5 is most of them; `stochastic` keeps them on average."""
    moments: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of AdamW's moments of weights that are rounded stochastically: 4 or 8 bytes a parameter. Others have that of the weights."""

    def of(self, group: str) -> GroupConfig:
        """Settings of `connector`, `vit`, `llm` or `pointing`."""
        return getattr(self, group)


@dataclasses.dataclass
class CheckpointConfig(BaseConfig):
    """Checkpoints while training. The last step always gets one."""

    interval: Size = 1000
    """Steps between two."""
    keep: Size | None = 2
    """How many of the latest stay; None = all."""
    keep_every: Size | None = None
    """Those of steps that this divides stay, too; None = none."""


@dataclasses.dataclass
class ValidationConfig(BaseConfig):
    """The loss on data that is not trained on."""

    data: DataConfig
    interval: Size = 1000
    """Steps between two."""
    batches: Size = 8
    """Global batches, the same ones every time."""


@dataclasses.dataclass
class SamplesConfig(BaseConfig):
    """Answers of the model to questions of a few records, as a picture."""

    records: str
    """A file, a folder or a glob of records with answers (docs/data.md)."""
    interval: Size = 1000
    """Steps between two; the last step always gets one."""
    count: Size = 8
    """Records, one question each."""
    max_new_tokens: Size = 64

    PATHS: ClassVar[tuple[str, ...]] = ("records",)


@dataclasses.dataclass
class ProfileConfig(BaseConfig):
    """A trace of what the first rank does."""

    steps: tuple[Annotated[int, Field(ge=2, le=2**31 - 1)], Size]
    """First and last step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps[0] > self.steps[1]:
            raise ConfigError(f"profile.steps={list(self.steps)}: the first step comes after the last")


@dataclasses.dataclass
class EmaConfig(BaseConfig):
    """An exponential moving average of the weights, beside them."""

    decay: Dropout = 0.999
    """Share of the average that a step keeps."""
    export: bool = True
    """Whether the trained `model` has the averaged weights, or those of the last step."""


@dataclasses.dataclass
class LoraConfig(BaseConfig):
    """Adapters: beside each matrix W of attention and feed-forward layers two thin ones, of which W + alpha / rank · B·A is made."""

    rank: Size = 16
    """Rows of A, columns of B."""
    alpha: Positive = 32.0


@dataclasses.dataclass
class TrainConfig(BaseConfig):
    """`python -m jobs.train`. A run of the same `name` and `storage` resumes where it stopped."""

    name: str
    """Name of the run: of its folder under `storage` and of its MLflow run."""
    model: BaseModelConfig
    """A model configuration, the path of one, or a checkpoint folder (then `init_from` is that folder unless given). Not given: that of
    `init_from`. With a key `base`, one of these paths, what is beside it are changes."""
    data: DataConfig
    """What to train on, or the path of a file that says so."""
    steps: Size
    storage: str = "runs"
    """Folder, or URL that pyarrow understands (s3://...), of checkpoints and of the run's state."""
    experiment: str = "molmo"
    """MLflow experiment."""
    init_from: str | None = None
    """Weights to begin with: a checkpoint folder of any layout or a registered model (models:/name@alias); None = random, and what
    `init_path` of language model and encoder name."""

    global_batch_size: Size = 128
    """Sequences of one optimiser step over all workers."""
    device_batch_size: Size | None = None
    """Sequences of one worker at a time; its share of the global batch is accumulated from as many. None = all at once."""
    sequence_length: Annotated[int, Field(ge=2, le=1 << 24)] = 2304
    seed: Seed = 6198

    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    z_loss: Weight = 1e-4
    """Weight of the mean squared log-normaliser of the output distribution; 0 = none."""
    ft_connector: bool = True
    """Train pooling, projector, padding and special-token embeddings."""
    ft_vit: bool = True
    ft_llm: bool = True
    ft_pointing: bool = True
    ft_embedding: Literal["lm_head", "ln_f", "wte", "all"] = "lm_head"
    """What of the language model's ends is trained: `lm_head` the last norm and the output head, `ln_f` only the last norm, `wte` only the
    token embeddings, `all` everything. (With tied weights the head is the embedding and follows `wte`.)"""

    lora: LoraConfig | None = None
    """Train adapters only, in the parts that `ft_connector`, `ft_vit` and `ft_llm` choose; the trained `model` has them in its weights."""

    precision: Precision = "amp_bf16"
    """`amp_bf16`: float32 weights, bfloat16 arithmetic; `bf16`: everything in bfloat16; `fp32`: everything in float32."""
    float8: bool = False
    """Products of the language model's blocks in float8, forward and backward, whatever the precision of the rest; on Ada, Hopper and later
    GPUs. A CPU computes the same numbers, slowly."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What every block computes again in the backward pass instead of keeping it: nothing; all but the results of matrix products and of
    attention; all of it."""
    compile: bool = False
    """torch.compile every block."""

    num_workers: Annotated[int, Field(ge=1, le=100_000)] = 1
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """One GPU a worker, or none; `auto`: GPUs if the cluster has as many as workers."""
    cpus_per_worker: Annotated[float, Field(ge=0, le=1024)] = 1.0
    check_memory: bool = True
    """Refuse a run whose weights, gradients and optimiser states cannot fit into the memory of this machine."""
    max_failures: Count = 3
    """Restarts from the last checkpoint after a worker died; 0 = none."""

    on_non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is infinite or not a number: the step is not taken, and the run stops, or goes on (10 in a row stop it)."""
    on_spike: Literal["report", "skip"] = "report"
    """A loss more than 6 standard deviations above the mean of the last 128: reported; with `skip` the step is not taken, either."""

    ema: EmaConfig | None = None
    stuck_after: Positive = 600.0
    """Seconds without the end of a step after which each rank says where it stands."""
    profile: ProfileConfig | None = None

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log_interval: Size = 20
    """Steps that one logged number is the mean of."""
    validation: ValidationConfig | None = None
    samples: SamplesConfig | None = None

    PATHS: ClassVar[tuple[str, ...]] = ("init_from",)

    def __post_init__(self) -> None:
        super().__post_init__()
        readers = self.parallel.replicate * self.parallel.shard(self.num_workers)
        share, rest = divmod(self.global_batch_size, readers)
        if rest:
            by = f"num_workers={self.num_workers}" if self.parallel.context == 1 else f"num_workers / parallel.context = {readers}"
            raise ConfigError(f"global_batch_size={self.global_batch_size} is not a multiple of {by}")
        if self.device_batch_size and share % self.device_batch_size:
            raise ConfigError(
                f"device_batch_size={self.device_batch_size} does not divide a worker's share of {share} sequences "
                f"(global_batch_size / num_workers)"
            )
        if self.sequence_length % (2 * self.parallel.context) and self.parallel.context > 1:
            raise ConfigError(
                f"sequence_length={self.sequence_length} is not a multiple of 2 · parallel.context = {2 * self.parallel.context}"
            )
        if self.parallel.context > 1 and not all(data.pad_to_max for data in self.all_data()):
            raise ConfigError("parallel.context needs batches of one length: set data.pad_to_max=true (and that of validation.data)")
        if self.name in ("", ".", "..") or "/" in self.name or not self.name.isprintable() or len(self.name.encode()) > MAX_NAME_BYTES:
            raise ConfigError(f"name={self.name[:300]!r} must be the name of a folder: printable, no slash, at most {MAX_NAME_BYTES} bytes")
        if not (self.ft_connector or self.ft_vit or self.ft_llm or self.ft_pointing):
            raise ConfigError("nothing to train: ft_connector, ft_vit, ft_llm and ft_pointing are all false")

        if self.lora is not None and self.init_from is None:
            raise ConfigError("lora adapts a trained model: init_from=CHECKPOINT is missing")
        if self.lora is not None and not (self.ft_connector or self.ft_vit or self.ft_llm):
            raise ConfigError("nothing to train: lora is for the parts that ft_connector, ft_vit and ft_llm choose, and all are false")

    def all_data(self) -> list[DataConfig]:
        """What is trained on, and what validates."""
        return [self.data, *([self.validation.data] if self.validation else [])]

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of one worker in one step."""
        share = self.global_batch_size * self.parallel.context // self.num_workers
        return share // (self.device_batch_size or share)

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        if isinstance(data.get("model"), dict):
            model = dict(data["model"])
            data["model"] = config_class(model.get("model_name", "molmo"), "model").from_dict(model, source="model")
        return data

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None, key: str | None = None) -> Self:
        """Reads a YAML file whose `model` and `data` may be paths of further files; overrides reach into those (`model.llm.n_layers=2`)."""
        path = Path(path)
        outer = [o for o in overrides or () if o.startswith("model.base=") or not o.startswith(("model.", "data."))]
        content = read_yaml(path, outer, key)
        model, changes = content.get("model"), _inner(overrides, "model.")
        if isinstance(model, dict) and "base" in model:
            changes = [f"{k}={json.dumps(v)}" for k, v in flatten(model).items() if k != "base"] + changes
            changes = [change for change in changes if not change.startswith("base=")]
            model = str(model["base"])
        if model is None and isinstance(content.get("init_from"), str):  # the weights bring their model's configuration
            content["init_from"] = model = str(_beside(path, content["init_from"]))
        if model is None:
            raise ConfigError(
                f"{path}: no model is given. init_from=CHECKPOINT fine-tunes one (a folder such as runs/demo/model, a registered "
                "models:/name@alias, or a repository of the hub such as allenai/Molmo-7B-D-0924); model=configs/models/FILE trains one "
                "from random weights"
            )
        if isinstance(model, str):
            file = model_folder(str(_beside(path, model)))
            if not file.is_file():  # a checkpoint, here or on the hub
                content.setdefault("init_from", str(file))
            content["model"] = BaseModelConfig.load(file, changes)
        else:
            content["model"] = BaseModelConfig.load(path, changes, key=f"{key}.model" if key else "model")
        if isinstance(content.get("data"), str):
            content["data"] = DataConfig.load(_beside(path, content["data"]), _inner(overrides, "data."))
        elif content.get("data") is not None:
            content["data"] = DataConfig.load(path, _inner(overrides, "data."), key=f"{key}.data" if key else "data")
        return cls.from_dict(content, source=str(path), base=path.parent)

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed: the model, the data, their order and how the steps depend on them."""
        names = (
            "model",
            "data",
            "init_from",
            "global_batch_size",
            "sequence_length",
            "seed",
            "ft_connector",
            "ft_vit",
            "ft_llm",
            "ft_pointing",
            "ft_embedding",
            "lora",
        )
        content = self.as_dict()
        data = {k: v for k, v in content["data"].items() if k not in ("actors", "prefetch", "max_reject_rate")}
        return {name: content[name] for name in names} | {"data": data}


def pinned(config: BaseConfig) -> None:
    """Makes every path in a configuration absolute that exists from the current folder: workers may stand elsewhere."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and field.name in config.PATHS and Path(value).exists():
            setattr(config, field.name, str(Path(value).absolute()))
        for inner in value.values() if isinstance(value, dict) else (value,):
            if isinstance(inner, BaseConfig):
                pinned(inner)


def _inner(overrides: list[str] | None, prefix: str) -> list[str]:
    return [o.removeprefix(prefix) for o in overrides or () if o.startswith(prefix)]


def _beside(path: Path, value: str) -> Path:
    """A path relative to the file that holds it, or to the current folder."""
    beside = path.parent / value
    return beside if beside.exists() else Path(value)
