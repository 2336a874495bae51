"""Pointing: the points written in an answer against what is to be pointed at, one to one.

One parser reads the texts of Molmo, Molmo2 and MolmoPoint: `molmo_core.preprocessing.points.extract_points`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molmo_core.metrics.registry import register
from molmo_core.metrics.truth import Box, Target, Truth
from molmo_core.preprocessing.points import extract_points

SAME_TIME = 0.5
"""Points of a video belong together up to so many seconds apart."""


def written_points(answer: str, truth: Truth) -> list[Target]:
    """The points of an answer, in pixels of the image that each names (of the first image if it names none)."""
    sizes = truth.image_sizes
    found = []
    for point in extract_points(answer, 1, 1):
        numbered = point.block is not None and len(sizes) > 1 and 1 <= point.block <= len(sizes)
        width, height = sizes[int(point.block) - 1] if numbered else sizes[0]  # type: ignore[arg-type]
        found.append(Target(point.x * width, point.y * height, point.block, object=point.id))
    return found


def hits(predicted: Sequence[Target], targets: Sequence[Target], radius: float) -> int:
    """How many predicted points hit their target, matched by the least total distance (Hungarian method).

    Args:
        predicted, targets: points in pixels. Those of other images, or more than `SAME_TIME` seconds apart, are never matched.
        radius: the largest distance of a hit in pixels, for targets without mask and box.
    """
    if not predicted or not targets:
        return 0
    # Here, because every configuration knows the names of the metrics, and scipy takes long to import.
    from scipy.optimize import linear_sum_assignment

    distance = np.array([[_distance(point, target) for target in targets] for point in predicted])
    # Finite, but dearer than all true distances together: matching such a pair never pays.
    apart = np.isinf(distance)
    far = 1 + distance[~apart].sum()
    rows, columns = linear_sum_assignment(np.where(apart, far, distance))
    return sum(
        not apart[i, j] and on_target(predicted[i], targets[j], radius) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    )


def _distance(point: Target, target: Target) -> float:
    if target.at is not None and point.at is not None and abs(point.at - target.at) > SAME_TIME:
        return np.inf
    return float(np.hypot(point.x - target.x, point.y - target.y))


def on_target(point: Target, target: Target, radius: float) -> bool:
    """Whether a point is on the target's mask, else in its box, else within `radius` of it (all borders count)."""
    if target.mask is not None:
        height, width = target.mask.shape
        # The right and lower border of an image belong to its last pixels.
        column, row = min(int(point.x), width - 1), min(int(point.y), height - 1)
        return bool(column >= 0 and row >= 0 and target.mask[row, column])
    if target.box is not None:
        return in_box(point, target.box)
    return bool(np.hypot(point.x - target.x, point.y - target.y) <= radius)


def in_box(point: Target, box: Box) -> bool:
    """Whether a point is in a box or on its border."""
    x0, y0, x1, y1 = box
    return x0 <= point.x <= x1 and y0 <= point.y <= y1


def scores(hit: int, predicted: int, targets: int) -> dict[str, float]:
    """F1, precision and recall. Where there is nothing to point at, all are 1 if nothing was predicted and else 0."""
    if not predicted or not targets:
        right = float(predicted == targets)
        return {"f1": right, "precision": right, "recall": right}
    return {"f1": 2 * hit / (predicted + targets), "precision": hit / predicted, "recall": hit / targets}


@register("pointing", main="f1", needs=("targets",))
def pointing(answer: str, truth: Truth, *, radius: float = 0.05) -> dict[str, float]:
    """PixMo-Points, PointBench, video pointing: F1 of points on the masks, in the boxes, or within `radius` of the image's width."""
    assert truth.targets is not None
    predicted = written_points(answer, truth)
    hit = hits(predicted, truth.targets, radius * truth.image_sizes[0][0])
    return scores(hit, len(predicted), len(truth.targets))


@register("point_in_box", main="hit", needs=("targets",))
def point_in_box(answer: str, truth: Truth, *, radius: float = 0.05) -> dict[str, float]:
    """ScreenSpot and other clicks: the first point of the answer is on any of the targets; further points do not count."""
    assert truth.targets is not None
    predicted = written_points(answer, truth)
    hit = bool(predicted) and any(on_target(predicted[0], target, radius * truth.image_sizes[0][0]) for target in truth.targets)
    return {"hit": float(hit), "valid": float(bool(predicted))}
