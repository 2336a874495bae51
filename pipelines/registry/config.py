"""Which checkpoint becomes which registered model, and what it must show to be promoted."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from molmo_core.config import BaseConfig, ConfigError, Count, Share
from pipelines.evaluation.config import EvaluateConfig


@dataclasses.dataclass
class RegisterConfig(BaseConfig):
    """`python -m jobs.register`: which checkpoint becomes which model."""

    checkpoint: str = ""
    """A self-contained folder: weights, configuration, tokenizer."""
    name: str = ""
    """The registered model; created on first use."""
    alias: str | None = "champion"
    """The alias that the new version gets; whoever serves `models:/name@alias` serves it from the next start on."""
    run_id: str | None = None
    """The MLflow run that trained it (None: a run of its own)."""
    evaluation: str | None = None
    """The output of `jobs.evaluate` for this checkpoint: its figures and pictures go into the model card."""
    data: str | None = None
    """The output of `jobs.prepare` that it was trained on: its report goes with the version."""

    PATHS: ClassVar[tuple[str, ...]] = ("checkpoint", "evaluation", "data")

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in ("checkpoint", "name") if not getattr(self, name)]
        if missing:
            raise ConfigError(f"register: {' and '.join(missing)} must be given (for example {missing[0]}=... on the command line)")


OVERALL = "overall"
"""The mean over all questions but pointing; every other metric is a type of question."""


@dataclasses.dataclass
class PromoteConfig(BaseConfig):
    """`python -m jobs.promote`: the gate that a version passes to become @champion."""

    records: str = ""
    """Questions with answers that candidate and champion are asked (docs/data.md shows the forms)."""
    output: str = "runs/promote"
    """Folder of reports and predictions. What a stopped promotion left there is continued, and a version is evaluated only once."""
    evaluate: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Other settings of `jobs.evaluate`: metric, max_new_tokens, workers, ..."""
    not_worse: dict[str, Share] = dataclasses.field(default_factory=lambda: {OVERALL: 0.01})
    """Margins by metric (`overall`, or a type of question): the 95 % interval of candidate minus champion must not reach below -margin."""
    better: list[str] = dataclasses.field(default_factory=list)
    """Metrics whose 95 % interval of candidate minus champion must lie above 0."""
    at_least: dict[str, Share] = dataclasses.field(default_factory=dict)
    """What the candidate must reach by metric, also where there is no champion yet."""
    seed: Count = 0
    """Of the bootstrap's resampling."""

    PATHS: ClassVar[tuple[str, ...]] = ("records",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.records:
            raise ConfigError("promote: records must be given (for example records=held-out.jsonl on the command line)")
        if fixed := sorted(set(self.evaluate) & {"model", "records", "output"}):
            raise ConfigError(f"promote: evaluate: {', '.join(fixed)} cannot be set here: the promotion sets them")
        self.evaluation("-", "-")

    @property
    def metrics(self) -> list[str]:
        """All that the gate names, in its order."""
        return list(dict.fromkeys([*self.not_worse, *self.better, *self.at_least]))

    def evaluation(self, model: str, output: str) -> EvaluateConfig:
        """How a version is evaluated; raises ConfigError for settings that `jobs.evaluate` does not know."""
        return EvaluateConfig.from_dict({**self.evaluate, "model": model, "records": self.records, "output": output}, source="evaluate")
