"""What is evaluated, on which records, by which metrics."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from molmo_core.config import BaseConfig, ConfigError, Count, Share, Size
from molmo_core.metrics import UnknownMetric, metric
from pipelines.data.config import Format
from pipelines.evaluation.columns import check_fields

TYPES = {"pointing": "pointing"} | dict.fromkeys(("point_count", "point_then_count", "count_then_point", "count"), "count")


@dataclasses.dataclass
class ScoringConfig(BaseConfig):
    """How answers are scored."""

    metric: str | None = None
    """How an answer is scored; None = by what the record has (docs/evaluation.md)."""
    metrics: dict[str, str] = dataclasses.field(default_factory=lambda: dict(TYPES))
    """Other metrics, by question type (a question's `type`, else its `style`)."""
    point_radius: Share = 0.05
    """A point hits within this share of the image's width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, name in {"metric": self.metric, **{f"metrics.{kind}": name for kind, name in self.metrics.items()}}.items():
            if name is not None:
                try:
                    metric(name)
                except UnknownMetric as error:
                    raise ConfigError(f"{key}: {error}") from None


@dataclasses.dataclass
class EvaluateConfig(ScoringConfig):
    """`python -m jobs.evaluate`: a model's greedy answers to the questions of records, scored."""

    model: str = ""
    """`models:/name@alias`, `models:/name/version` or a checkpoint folder."""
    records: str = ""
    """A file, a folder or a glob of records with answers (docs/data.md shows the forms)."""
    output: str = ""
    """Folder of the report, its pictures and predictions/*.parquet. What a stopped evaluation left there is continued."""
    format: Format = "auto"
    fields: dict[str, str | list[str]] = dataclasses.field(default_factory=dict)
    """Of a file whose rows are not records: what each field of a record is made of (docs/evaluation.md)."""
    limit: Size | None = None
    """Use only the first records."""

    max_new_tokens: Size = 64
    shard_records: Size = 64
    """Records that a worker answers at a time, and whose results are written together: at most these are lost when it is killed."""
    workers: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Copies of the model; None = one a CPU (or GPU) of the cluster."""
    cpus_per_worker: Annotated[float, Field(ge=0, le=1024)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0, le=64)] = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    samples: Count = 12
    """Answers on the picture."""
    examples: Count = 50
    """Worst answers on the report's page, and so many random ones."""
    max_reject_rate: Share = 0.01
    """Stop when a larger share of the records is unusable."""

    PATHS: ClassVar[tuple[str, ...]] = ("model", "records")

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in ("model", "records", "output") if not getattr(self, name)]
        if missing:
            raise ConfigError(f"evaluate: {', '.join(missing)} must be given (for example {missing[0]}=... on the command line)")
        check_fields(self.fields)
