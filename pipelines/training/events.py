"""What the workers tell the driver (`progress` carries it, `trainer.Driver` handles it)."""

from __future__ import annotations

import dataclasses
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Note:
    """A line for people."""

    text: str


@dataclasses.dataclass(frozen=True)
class Started:
    """The model is there and the first step begins, after step `step`."""

    step: int
    parts: dict[str, float] = dataclasses.field(default_factory=dict, compare=False)
    """Seconds of the worker's start (`startup.Startup`)."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Step `step` is done (sent at most twice a second)."""

    step: int


@dataclasses.dataclass(frozen=True)
class Metrics:
    step: int
    values: dict[str, float]
    when: int = dataclasses.field(default_factory=lambda: int(time.time() * 1000), compare=False)
    """Milliseconds since 1970."""


@dataclasses.dataclass(frozen=True)
class Before:
    """What was logged shortly before the checkpoint that a run continues from: a driver that was killed may not have heard of it."""

    metrics: list[Metrics]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Answers of the model, in the form of an evaluation's results."""

    step: int
    results: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Unusual:
    """A step that was left out, or whose loss leaps."""

    step: int
    text: str
    examples: list[str]
    """All of its global batch, as `dataset[row]`."""


@dataclasses.dataclass(frozen=True)
class Stuck:
    """No step has ended on a rank for some time."""

    rank: int
    step: int
    """The last that ended."""
    seconds: float
    stack: str

    def __str__(self) -> str:
        return f"rank {self.rank}: no step has ended for {self.seconds:.0f} s, after step {self.step}. It is here:\n{self.stack}"


@dataclasses.dataclass(frozen=True)
class Saved:
    """The checkpoint of step `step` is whole and in its place."""

    step: int
    seconds: float = dataclasses.field(default=0.0, compare=False)
    """From the end of the step to here."""
    staging: float = dataclasses.field(default=0.0, compare=False)
    """Seconds of the copy that training waited for."""
    blocked: float = dataclasses.field(default=0.0, compare=False)
    """Seconds that training waited for the writing."""


@dataclasses.dataclass(frozen=True)
class Stopped:
    """The run ends before its last step, as it was asked to; `step` is saved."""

    step: int


@dataclasses.dataclass(frozen=True)
class Done:
    """The run has reached its last step."""

    step: int
    model: str
    """Folder, or URL, of the trained model."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """The run cannot continue, and another try would end the same way."""

    error: Exception


Event = Note | Started | Step | Metrics | Before | Samples | Unusual | Stuck | Saved | Stopped | Done | Failed
