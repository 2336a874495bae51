"""The metrics by name, and which of them fits a record.

A metric is a function from an answer and its `Truth` to scores by name, marked with `register`; its keyword-only arguments are its
settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from molmo_core.metrics.figures import Figure
from molmo_core.metrics.truth import Truth

Score = Callable[..., dict[str, float]]
F = TypeVar("F", bound=Score)
Whole = Callable[[Sequence[str], Sequence[Truth], int], dict[str, Figure]]
"""Of a whole set: its answers, their truths and a seed."""


class UnknownMetric(ValueError):
    """No metric has this name, or it does not have this setting; the message lists what there is."""


class TruthMissing(ValueError):
    """The record does not say what a metric compares with; the message names the part."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric with its settings.

    Attributes:
        name: in the registry.
        main: which of its scores stands for it, where there is room for one. 0 is wrong, 1 is right, like all scores of one answer.
        needs: the parts of a `Truth` that it compares with.
        settings: by name, with the values given to `metric`.
        whole: figures of a set that are not means over its answers (BLEU); None: means are all there is.
    """

    name: str
    main: str
    needs: tuple[str, ...]
    score: Score
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    whole: Whole | None = None

    def __call__(self, answer: str, truth: Truth) -> dict[str, float]:
        """The scores of one answer, `main` first.

        Raises:
            TruthMissing: the truth lacks what this metric needs.
        """
        self.check(truth)
        return self.score(answer, truth, **self.settings)

    def check(self, truth: Truth) -> None:
        """Raises `TruthMissing` if an answer could not be scored."""
        for part in self.needs:
            if not truth.has(part):
                raise TruthMissing(f"the metric {self.name} needs {part}, which the record does not have")


_METRICS: dict[str, Metric] = {}


def register(name: str, main: str, needs: Sequence[str], whole: Whole | None = None) -> Callable[[F], F]:
    """Marks a function as the metric `name`."""

    def marked(score: F) -> F:
        if name in _METRICS:
            raise ValueError(f"two metrics are called {name}")
        _METRICS[name] = Metric(name, main, tuple(needs), score, whole=whole)
        return score

    return marked


def names() -> list[str]:
    """Of all metrics."""
    return sorted(_METRICS)


def metric(name: str, **settings: Any) -> Metric:
    """The metric of a name.

    Raises:
        UnknownMetric: no such metric, or no such setting of it.
    """
    if name not in _METRICS:
        raise UnknownMetric(f"no metric is called {name!r}{_nearest(name, names())}; there are {', '.join(names())}")
    found = _METRICS[name]
    known = _settings_of(found.score)
    for setting in settings:
        if setting not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UnknownMetric(f"the metric {name} has no setting {setting!r}{_nearest(setting, known)}; {has}")
    return dataclasses.replace(found, settings=settings)


@functools.cache
def _settings_of(score: Score) -> tuple[str, ...]:
    parameters = inspect.signature(score).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


_BY_PART = (
    ("option", "multiple_choice"),
    ("tracks", "tracking"),
    ("targets", "pointing"),
    ("count", "count"),
    ("spans", "temporal_iou"),
    ("captions", "caption"),
    ("answers", "vqa_score"),
)


def metric_for(truth: Truth) -> str:
    """The name of the metric for what a record has: the first of an option, tracks, points, a count, spans of time, captions, answers.

    Raises:
        TruthMissing: it has none of them.
    """
    for part, name in _BY_PART:
        if truth.has(part):
            return name
    raise TruthMissing(f"the record has none of {', '.join(part for part, _ in _BY_PART)}")
