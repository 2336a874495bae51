"""What is evaluated, on which records, by which metrics."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from molmo_core.config import BaseConfig, ConfigError
from pipelines.data.config import Format

Metric = Literal["vqa_score", "exact_match", "relaxed_accuracy", "anls", "multiple_choice", "count", "pointing"]


@dataclasses.dataclass
class ScoringConfig(BaseConfig):
    """How answers are scored."""

    metric: Metric = "vqa_score"
    """How an answer is scored."""
    metrics: dict[str, Metric] = dataclasses.field(default_factory=lambda: {"pointing": "pointing", "point_count": "count"})
    """Other metrics, by question type (a question's `type`, else its `style`)."""
    point_radius: float = 0.05
    """A point hits within this share of the image's width."""


@dataclasses.dataclass
class EvaluateConfig(ScoringConfig):
    """`python -m jobs.evaluate`: a model's greedy answers to the questions of records, scored."""

    model: str = ""
    """`models:/name@alias`, `models:/name/version` or a checkpoint folder."""
    records: str = ""
    """A file, a folder or a glob of records with answers (docs/data.md shows the forms)."""
    output: str = ""
    """Folder of report.json, predictions.jsonl and answers.png."""
    format: Format = "auto"
    limit: int | None = None
    """Use only the first records."""

    max_new_tokens: int = 64
    records_per_batch: int = 16
    """Records whose questions are answered together."""
    workers: int | None = None
    """Copies of the model; None = one a CPU (or GPU) of the cluster."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    samples: int = 12
    """Answers on the picture."""
    max_reject_rate: float = 0.01
    """Stop when a larger share of the records is unusable."""

    PATHS: ClassVar[tuple[str, ...]] = ("model", "records")

    def __post_init__(self) -> None:
        missing = [name for name in ("model", "records", "output") if not getattr(self, name)]
        if missing:
            raise ConfigError(f"evaluate: {', '.join(missing)} must be given (for example {missing[0]}=... on the command line)")
