"""Tracking by points: the tracks written in an answer against the true ones, by HOTA (Luiten et al., IJCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from molmo_core.metrics.pointing import SAME_TIME, hits, on_target, scores, written_points
from molmo_core.metrics.registry import register
from molmo_core.metrics.truth import Target, Truth

THRESHOLDS = np.arange(1, 20) * 0.05
"""Similarities from which on a pair counts: 0.05 to 0.95."""
_EXACT = 1e-9


class Hota(NamedTuple):
    """HOTA and its two parts, averaged over the thresholds."""

    hota: float
    detection: float
    association: float


@register("tracking", main="hota", needs=("tracks",))
def tracking(answer: str, truth: Truth, *, radius: float = 0.05) -> dict[str, float]:
    """Video object tracking (MeViS, Ref-YT-VOS, Molmo2 tracks): `hota` with its `detection` and `association`, and F1 of the points.

    A point that is on its mask or in its box is wholly similar, others not at all. Where there are only points, the similarity falls from
    1 at the point to 0 at `radius` (a share of the width), and a point counts for F1 up to `radius`.
    """
    assert truth.tracks is not None
    found = written_points(answer, truth)
    reach = radius * truth.image_sizes[0][0]
    result = hota(found, truth.tracks, reach)
    return {**result._asdict(), **scores(hits(found, truth.tracks, reach), len(found), len(truth.tracks))}


def hota(found: Sequence[Target], truth: Sequence[Target], radius: float) -> Hota:
    """HOTA of tracks; where there are none, 1 if none were found and else 0.

    Args:
        found, truth: points in pixels with their time (`at`) and `object`.
        radius: of targets without mask and box, in pixels.
    """
    if not found or not truth:
        return Hota(*[float(len(found) == len(truth))] * 3)
    from scipy.optimize import linear_sum_assignment  # see `pointing.hits`

    true_ids, found_ids = _numbers(truth), _numbers(found)
    true_counts, found_counts = np.bincount(true_ids)[:, None], np.bincount(found_ids)[None, :]
    frames = [(t, f, _similarity([found[i] for i in f], [truth[i] for i in t], radius)) for t, f in _frames(found, truth)]
    # How well two tracks fit as a whole decides between pairs of a frame.
    together = np.zeros((len(true_counts), found_counts.shape[1]))
    for t, f, similar in frames:
        others = similar.sum(0)[None, :] + similar.sum(1)[:, None] - similar
        np.add.at(together, (true_ids[t][:, None], found_ids[f][None, :]), np.divide(similar, others, where=others > 0, out=similar * 0))
    alignment = together / (true_counts + found_counts - together)
    matches = np.zeros((len(THRESHOLDS), *together.shape))
    for t, f, similar in frames:
        rows, columns = linear_sum_assignment(alignment[true_ids[t][:, None], found_ids[f][None, :]] * similar, maximize=True)
        for row, column in zip(rows, columns, strict=True):
            matches[similar[row, column] >= THRESHOLDS - _EXACT, true_ids[t[row]], found_ids[f[column]]] += 1
    right = matches.sum((1, 2))
    detection = right / (len(truth) + len(found) - right)
    shared = matches / np.maximum(true_counts + found_counts - matches, 1)
    association = (matches * shared).sum((1, 2)) / np.maximum(right, 1)
    return Hota(float(np.sqrt(detection * association).mean()), float(detection.mean()), float(association.mean()))


def _numbers(points: Sequence[Target]) -> np.ndarray:
    """The objects of points, numbered from 0; a point without an object is one by itself."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(("no object", i) if p.object is None else p.object, len(numbers)) for i, p in enumerate(points)])


def _frames(found: Sequence[Target], truth: Sequence[Target]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The points of each true frame, and the found ones that are nearest in time to it: their numbers."""
    times = np.unique([target.at or 0.0 for target in truth])
    true_frame = np.searchsorted(times, [target.at or 0.0 for target in truth])
    when = np.array([point.at or 0.0 for point in found])
    nearest = np.abs(when[:, None] - times).argmin(1)
    nearest[np.abs(times[nearest] - when) > SAME_TIME] = -1
    return [(np.flatnonzero(true_frame == k), np.flatnonzero(nearest == k)) for k in range(len(times)) if (nearest == k).any()]


def _similarity(found: Sequence[Target], truth: Sequence[Target], radius: float) -> np.ndarray:
    """[true, found], 0 to 1."""

    def similar(point: Target, target: Target) -> float:
        if target.mask is not None or target.box is not None:
            return float(on_target(point, target, radius))
        return max(0.0, 1 - float(np.hypot(point.x - target.x, point.y - target.y)) / radius)

    return np.array([[similar(point, target) for point in found] for target in truth])
