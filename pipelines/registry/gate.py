"""Whether a candidate may take the champion's place: figures of both on the same questions, compared question by question."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from molmo_core.metrics import paired_difference
from pipelines.registry.config import OVERALL, PromoteConfig

POINTING = "pointing"


class Scores(NamedTuple):
    """Scores 0 to 1 of the same questions, float64 [questions] each."""

    candidate: np.ndarray
    champion: np.ndarray | None
    alone: int
    """Questions that only one of both could be asked; the other has 0 there."""
    records: list[int]
    """Of each question: those about one picture go up and down together, so that intervals are of whole records."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One metric against the gate."""

    metric: str
    questions: int
    candidate: float
    champion: float | None
    difference: tuple[float, float, float] | None
    """Candidate minus champion, and the ends of its 95 % interval."""
    failures: list[str]
    """What it does not fulfil."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the gate says."""

    checks: list[Check]
    notes: list[str]

    @property
    def passed(self) -> bool:
        return not any(check.failures for check in self.checks)

    @property
    def why(self) -> str:
        """In a line."""
        failures = [f"{check.metric}: {failure}" for check in self.checks for failure in check.failures]
        return "; ".join([*failures, *self.notes] or [_told(check) for check in self.checks])


def decide(config: PromoteConfig, candidate: pa.Table, champion: pa.Table | None) -> Decision:
    """Applies the gate.

    Args:
        config: of the gate.
        candidate, champion: `Report.scores()` of both on the same records; None: there is no champion.
    """
    checks, notes = [], []
    for metric in config.metrics:
        scores = scores_of(metric, candidate, champion)
        checks.append(_check(config, metric, scores))
        if scores.alone:
            notes.append(f"{metric}: {scores.alone} of {len(scores.candidate)} questions could be asked to only one of both (the other: 0)")
    if champion is None:
        reached = "Only at_least decides" if config.at_least else "The gate names no absolute figures (at_least)"
        notes.append(f"There is no champion to compare with. {reached}.")
    return Decision(checks, notes)


def scores_of(metric: str, candidate: pa.Table, champion: pa.Table | None) -> Scores:
    """The scores that a metric is about, paired."""
    ours, theirs = _by_question(metric, candidate), _by_question(metric, champion) if champion is not None else None
    keys = sorted(ours.keys() | (theirs or {}).keys())
    return Scores(
        np.array([ours.get(key, 0.0) for key in keys]),
        None if theirs is None else np.array([theirs.get(key, 0.0) for key in keys]),
        0 if theirs is None else len(ours.keys() ^ theirs.keys()),
        [record for record, _ in keys],
    )


def _by_question(metric: str, table: pa.Table) -> dict[tuple[int, int], float]:
    columns = (table.column(name).to_pylist() for name in ("record", "number", "type", "metric", "score"))
    return {
        (record, number): score
        for record, number, kind, scored_by, score in zip(*columns)
        if (scored_by != POINTING if metric == OVERALL else kind == metric)
    }


def _check(config: PromoteConfig, metric: str, scores: Scores) -> Check:
    count = len(scores.candidate)
    if not count:
        return Check(metric, 0, float("nan"), None, None, ["no question of this kind could be asked"])
    mean, failures = float(scores.candidate.mean()), []
    if mean < (least := config.at_least.get(metric, 0.0)):
        failures.append(f"{mean:.1%} is less than {least:.1%}")
    if scores.champion is None:
        return Check(metric, count, mean, None, None, failures)
    difference = paired_difference(scores.candidate.tolist(), scores.champion.tolist(), config.seed, groups=scores.records)
    low = difference[1]
    shown = f"the difference is {interval_text(difference)}"
    if metric in config.not_worse and low < -config.not_worse[metric]:
        failures.append(f"may be worse by more than {config.not_worse[metric]:.1%}: {shown}")
    if metric in config.better and low <= 0:
        failures.append(f"is not shown to be better: {shown}")
    return Check(metric, count, mean, float(scores.champion.mean()), difference, failures)


def interval_text(difference: tuple[float, float, float]) -> str:
    """`+1.2 % [+0.3, +2.1]`."""
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _told(check: Check) -> str:
    if check.difference is None:
        return f"{check.metric} {check.candidate:.1%}"
    return f"{check.metric} {check.candidate:.1%}, {interval_text(check.difference)}"
