"""Scores of many answers as figures: means with bootstrap confidence intervals, and the difference of two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
_BLOCK = 1 << 22
"""Numbers drawn at a time: 32 MiB of indices."""


class Figure(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int
    """Answers it is the mean of. Of a single one the interval is that answer's score, which says nothing about others."""


def summarise(scores: Mapping[str, Sequence[float]], seed: int, groups: Sequence[int] | None = None) -> dict[str, Figure]:
    """The mean of each list of scores, with the percentile interval of a bootstrap over its answers.

    Args:
        scores: by name, at least one of each.
        seed: of the resampling; the same scores and seed give the same interval, whatever the other lists are.
        groups: for each answer the number of what it shares with others, such as its image. Groups are then drawn whole: ten questions
            about one image say less about the next image than ten about ten.

    Raises:
        ValueError: a list without scores, or with one that is not finite; groups of another length.
    """
    figures = {}
    for name, values in scores.items():
        array = _checked(name, values)
        figures[name] = Figure(float(array.mean()), *_of_mean(array, seed, groups), len(array))
    return figures


def paired_difference(
    a: Sequence[float], b: Sequence[float], seed: int = 0, groups: Sequence[int] | None = None
) -> tuple[float, float, float]:
    """How much higher the mean of `a` is than that of `b`: (difference, low, high), by a bootstrap over the pairs.

    Args:
        a, b: scores of the same questions in the same order.
        groups: as of `summarise`.

    Raises:
        ValueError: lists of different lengths, none, or scores that are not finite.
    """
    first, second = _checked("a", a), _checked("b", b)
    if len(first) != len(second):
        raise ValueError(f"a paired difference is of scores of the same questions, found {len(first)} and {len(second)}")
    difference = first - second
    return (float(difference.mean()), *_of_mean(difference, seed, groups))


def _of_mean(values: np.ndarray, seed: int, groups: Sequence[int] | None) -> tuple[float, float]:
    if groups is None:
        return interval(values[:, None], seed)
    if len(groups) != len(values):
        raise ValueError(f"each score belongs to a group, found {len(values)} scores and {len(groups)} groups")
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.stack([np.bincount(number, values), np.bincount(number)], 1)
    return interval(sums, seed, lambda mean: mean[:, 0] / mean[:, 1])


def interval(rows: np.ndarray, seed: int, statistic: Callable[[np.ndarray], np.ndarray] | None = None) -> tuple[float, float]:
    """The 95 % percentile interval of a function of the mean row under resampling of the rows.

    Args:
        rows: float [n, k], one row an answer.
        statistic: from mean rows [resamples, k] to values [resamples]; None = the first column.
    """
    random = np.random.default_rng(seed)
    n = len(rows)
    step = max(1, min(RESAMPLES, _BLOCK // n))
    means = [rows[random.integers(n, size=(min(step, RESAMPLES - done), n))].mean(1) for done in range(0, RESAMPLES, step)]
    values = np.concatenate(means)[:, 0] if statistic is None else statistic(np.concatenate(means))
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _checked(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: a list of at least one score is needed")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: score {int(np.flatnonzero(~np.isfinite(array))[0])} is not a finite number")
    return array
