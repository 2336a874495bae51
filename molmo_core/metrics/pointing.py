"""Pointing: predicted against true points, one to one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist


class PointingScore(NamedTuple):
    """Of one picture."""

    precision: float
    recall: float
    f1: float


def pointing_score(predicted: ArrayLike, target: ArrayLike, radius: float) -> PointingScore:
    """Matches points by the least total distance (Hungarian method); a pair within `radius` is a hit.

    Args:
        predicted: [n, 2] (x, y) in any unit, n may be 0.
        target: [m, 2] in the same unit.
        radius: the largest distance of a hit in that unit, for example 5 % of the picture's width.

    Returns:
        precision, recall and F1. Where there is nothing to point at, all are 1 if nothing was predicted and else 0.
    """
    found, truth = np.asarray(predicted, float).reshape(-1, 2), np.asarray(target, float).reshape(-1, 2)
    if not len(found) or not len(truth):
        return PointingScore(*[float(len(found) == len(truth))] * 3)
    distance = cdist(found, truth)
    hits = int(np.sum(distance[linear_sum_assignment(distance)] <= radius))
    precision, recall = hits / len(found), hits / len(truth)
    return PointingScore(precision, recall, 2 * hits / (len(found) + len(truth)))
