"""Points are matched one to one, by the least total distance."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.metrics import pointing_score

points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4)


def test_nothing_to_point_at():
    assert pointing_score([], [], 5) == (1, 1, 1)
    assert pointing_score([(1, 1)], [], 5) == (0, 0, 0)
    assert pointing_score([], [(1, 1)], 5) == (0, 0, 0)


def test_radius_and_counts():
    assert pointing_score([(10, 10)], [(13, 14)], 5) == (1, 1, 1), "a distance of exactly the radius is a hit"
    assert pointing_score([(10, 10)], [(13, 14)], 4.99) == (0, 0, 0)
    precision, recall, f1 = pointing_score([(0, 0), (50, 50)], [(0, 1)], 5)
    assert (precision, recall, f1) == (0.5, 1, pytest.approx(2 / 3))


def test_one_prediction_hits_one_target():
    assert pointing_score([(0, 0), (0, 0)], [(0, 0), (9, 9)], 1).recall == 0.5


@given(points, points)
def test_matching_has_the_least_total_distance(predicted, target):
    """Brute force over all assignments of the smaller set; of equally long ones the best and worst hit counts bound ours."""
    few, many = sorted((predicted, target), key=len)
    totals = {}
    for order in itertools.permutations(range(len(many)), len(few)):
        distances = [np.hypot(few[i][0] - many[j][0], few[i][1] - many[j][1]) for i, j in enumerate(order)]
        totals.setdefault(round(sum(distances), 6), []).append(sum(d <= 5 for d in distances))
    best = totals[min(totals)]
    hits = pointing_score(predicted, target, 5).precision * len(predicted)
    assert min(best) - 1e-9 <= hits <= max(best) + 1e-9
