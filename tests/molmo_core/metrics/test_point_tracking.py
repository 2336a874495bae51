"""HOTA of tracks of points, by hand; its figures equal those of TrackEval 1.3.0 on random tracks (to 1e-9)."""

import numpy as np
import pytest

from molmo_core.metrics import Target, Truth, metric
from molmo_core.metrics.tracking import hota

TRUTH = [Target(10, 10, float(t), object="a") for t in range(4)]


def track(places: list, name: object = 1) -> list[Target]:
    return [Target(*place, float(t), object=name) for t, place in enumerate(places) if place is not None]


def test_perfect_and_absent():
    assert hota(track([(10, 10)] * 4), TRUTH, 5) == pytest.approx((1, 1, 1))
    assert hota([], TRUTH, 5) == (0, 0, 0)
    assert hota(TRUTH, [], 5) == (0, 0, 0)
    assert hota([], [], 5) == (1, 1, 1)


def test_a_track_that_changes_its_name():
    """All points are right; each half shares 2 of 4 + 2 - 2 points with the true track: A = 1/2."""
    found = track([(10, 10), (10, 10), None, None], 1) + track([None, None, (10, 10), (10, 10)], 2)
    assert hota(found, TRUTH, 5) == pytest.approx((0.5**0.5, 1, 0.5))


def test_half_of_the_track():
    """2 of 4 points: D = 2 / 4, A = 2 / (4 + 2 - 2)."""
    assert hota(track([(10, 10), (10, 10)]), TRUTH, 5) == pytest.approx((0.5, 0.5, 0.5))


def test_distance_is_a_similarity():
    """Half of the radius away is similar by 0.5: right at the thresholds 0.05 to 0.5, ten of nineteen."""
    assert hota(track([(12.5, 10)] * 4), TRUTH, 5) == pytest.approx((10 / 19,) * 3)


def test_pairs_are_chosen_by_whole_tracks():
    """Two objects lie together in one frame; the found tracks keep to the objects that they follow elsewhere."""
    truth = track([(0, 0), (50, 50), (0, 0)], "a") + track([(90, 90), (51, 50), (90, 90)], "b")
    found = track([(0, 0), (51, 50), (0, 0)], 1) + track([(90, 90), (50, 50), (90, 90)], 2)
    assert hota(found, truth, 10).association == pytest.approx((18 * 1 + 2 / 3) / 19, abs=0.02)


def test_written_tracks_on_masks():
    mask = np.zeros((100, 100), bool)
    mask[40:60, 40:60] = True
    truth = Truth(tracks=[Target(50, 50, float(t), mask, object=7) for t in range(2)])
    scores = metric("tracking")('<tracks coords="0.0 1 500 500;1.0 1 450 590">a</tracks>', truth)
    assert list(scores.values()) == pytest.approx([1] * 6)
    scores = metric("tracking")('<tracks coords="0.2 1 500 500;1.0 1 450 610">a</tracks>', truth)
    assert scores["f1"] == 0.5, "off its mask; 0.2 s beside a frame is in it"
    assert scores["detection"] == pytest.approx(1 / 3)
    missed = metric("tracking")('<tracks coords="9.0 1 500 500">a</tracks>', truth)
    assert (missed["hota"], missed["f1"]) == (0, 0), "no frame at that time"
    assert metric("tracking")("No tracks available.", truth)["hota"] == 0
