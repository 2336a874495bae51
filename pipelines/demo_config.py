"""What a demo consists of: one configuration file a stage, and what is told about them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from molmo_core.config import BaseConfig, ConfigError, Size, nearest

STAGES = ("prepare", "train", "evaluate", "register", "serve")


@dataclasses.dataclass
class DemoConfig(BaseConfig):
    """`python -m jobs.demo`: prepares, trains, evaluates, registers, serves and asks, each as its configuration file says."""

    dataset: str
    """Its name, for the summary."""
    folder: str
    """Where the stages' files write. Made anew every time."""
    prepare: str
    train: str
    evaluate: str
    register: str
    serve: str
    told: dict[str, str]
    """What is said as `prepare`, `train` and `evaluate` begin."""
    asked: list[str]
    """Types of questions that the served model is asked, one each, about records of the evaluation. The last answer is streamed."""
    cpus: Size = 3
    """Of the cluster: one more than training's workers, for what works beside them."""

    PATHS: ClassVar[tuple[str, ...]] = STAGES

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [stage for stage in ("prepare", "train", "evaluate") if stage not in self.told]
        if missing or not self.asked:
            raise ConfigError(f"demo: {f'told.{missing[0]}' if missing else 'asked'} must be given")


def by_stage(overrides: list[str] | None) -> dict[str, list[str]]:
    """`["train.steps=5"]` as `{"train": ["steps=5"], ...}`."""
    stages: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for override in overrides or ():
        stage, dot, rest = override.partition(".")
        if not dot or stage not in stages:
            hint = nearest(stage, stages)
            raise ConfigError(f"demo: {override!r} must begin with a stage and a dot, for example train.steps=300.{hint}")
        stages[stage].append(rest)
    return stages
