"""Points are matched one to one, by the least total distance, and hit by mask, box or distance."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.metrics import Target, Truth, metric
from molmo_core.metrics.pointing import hits, on_target, scores, written_points

points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4)


def targets(*places) -> list[Target]:
    return [Target(*place) for place in places]


def tag(*places) -> str:
    pairs = " ".join(f'x{i}="{x}" y{i}="{y}"' for i, (x, y) in enumerate(places, 1))
    return f'<points {pairs} alt="a">a</points>'


def test_nothing_to_point_at():
    pointing = metric("pointing")
    assert pointing("There are none.", Truth(targets=[])) == {"f1": 1, "precision": 1, "recall": 1}
    assert pointing(tag((1, 1)), Truth(targets=[])) == {"f1": 0, "precision": 0, "recall": 0}
    assert pointing("There are none.", Truth(targets=targets((1, 1)))) == {"f1": 0, "precision": 0, "recall": 0}


def test_radius_and_counts():
    assert hits(targets((10, 10)), targets((13, 14)), 5) == 1, "a distance of exactly the radius is a hit"
    assert hits(targets((10, 10)), targets((13, 14)), 4.99) == 0
    assert hits(targets((0, 0), (0, 0)), targets((0, 0), (9, 9)), 1) == 1, "one prediction hits one target"
    assert scores(1, 2, 1) == {"f1": pytest.approx(2 / 3), "precision": 0.5, "recall": 1}


@given(points, points)
def test_matching_has_the_least_total_distance(predicted, target):
    """Brute force over all assignments of the smaller set; of equally long ones the best and worst hit counts bound ours."""
    few, many = sorted((predicted, target), key=len)
    totals = {}
    for order in itertools.permutations(range(len(many)), len(few)):
        distances = [np.hypot(few[i][0] - many[j][0], few[i][1] - many[j][1]) for i, j in enumerate(order)]
        totals.setdefault(round(sum(distances), 6), []).append(sum(d <= 5 for d in distances))
    best = totals[min(totals)]
    assert min(best) <= hits(targets(*predicted), targets(*target), 5) <= max(best)


def test_the_radius_is_a_share_of_the_width():
    truth = Truth(targets=targets((100, 50)), image_sizes=[(200, 100)])
    assert metric("pointing")(tag((54.9, 50)), truth)["f1"] == 1
    assert metric("pointing")(tag((50, 60.1)), truth)["f1"] == 0
    assert metric("pointing", radius=0.02)(tag((54.9, 50)), truth)["f1"] == 0


def test_masks_and_boxes():
    mask = np.zeros((100, 200), bool)
    mask[10:20, 30:40] = True
    target = Target(35, 15, mask=mask)
    assert on_target(Target(39.9, 19.9), target, 0)
    assert not on_target(Target(40, 19), target, 100), "a mask comes before the distance"
    corner = Target(0, 0, mask=np.eye(4, dtype=bool))
    assert on_target(Target(4, 4), corner, 0), "the border of the image belongs to its last pixels"
    assert on_target(Target(10, 20), Target(0, 0, box=(5, 5, 10, 20)), 0)
    assert not on_target(Target(10.1, 20), Target(0, 0, box=(5, 5, 10, 20)), 0)


def test_a_hit_is_on_the_mask_of_the_matched_target():
    """Both points are on the left mask, whose point is matched with the nearer of them; the other is matched with the right one."""
    left, right = np.zeros((2, 10, 20), bool)
    left[:, :10], right[:, 15:] = True, True
    truth = [Target(2, 5, mask=left), Target(17, 5, mask=right)]
    assert hits(targets((2, 5), (8, 5)), truth, 0) == 1
    assert hits(targets((8, 5), (16, 5)), truth, 0) == 2


def test_first_point_in_any_box():
    truth = Truth(targets=[Target(0, 0, box=(10, 10, 30, 30)), Target(0, 0, box=(80, 80, 90, 90))])
    click = metric("point_in_box")
    assert click('<point x="20.0" y="30.0" alt="a">a</point>', truth) == {"hit": 1, "valid": 1}
    assert click('<points coords="1 1 850 850 2 500 500">a</points>', truth) == {"hit": 1, "valid": 1}
    assert click('<points coords="1 1 500 500 2 850 850">a</points>', truth) == {"hit": 0, "valid": 1}, "only the first counts"
    assert click("There are none.", truth) == {"hit": 0, "valid": 0}


def test_images_and_times_are_kept_apart():
    sizes = [(100, 100), (1000, 500)]
    truth = Truth(targets=[Target(50, 50, 1), Target(500, 250, 2)], image_sizes=sizes)
    both, swapped = '<points coords="1 1 500 500;2 2 500 500">a</points>', '<points coords="2 1 050 100">a</points>'
    assert metric("pointing")(both, truth)["f1"] == 1
    assert [(p.x, p.y, p.at) for p in written_points(swapped, truth)] == [(50, 50, 2)]
    assert metric("pointing")(swapped, truth)["f1"] == 0, "the right place, but in the other image"
    video = Truth(targets=[Target(50, 50, 2.0), Target(50, 50, 4.0)])
    assert metric("pointing")('<points coords="2.5 1 500 500;4.6 2 500 500">a</points>', video)["f1"] == 0.5, "0.5 s is the same time"


@pytest.mark.parametrize(
    "answer",
    [
        '<points x1="25.0" y1="50.0" x2="75.0" y2="50.0" alt="cups">cups</points>',
        'Counting the <points x1="25.0" y1="50.0" x2="75.0" y2="50.0" alt="cups">cups</points> shows a total of 2.',
        '<points coords="1 1 250 500 2 750 500">cups</points>',
        '<points alt="cups" coords="1 1 250 500 2 750 500">cups</points>',
        'There are 2 <points coords="1 1 250 500 2 750 500">cups</points>.',
        "(25, 50) and (75.0, 50)",
        "p=250,500 p=750,500",
    ],
)
def test_every_form_of_the_family(answer):
    """Molmo, Molmo2 (which is also how MolmoPoint's answers are read), and the older ones: the same points, the same scores."""
    truth = Truth(targets=targets((50, 50), (150, 50)), image_sizes=[(200, 100)])
    assert metric("pointing")(answer, truth) == {"f1": 1, "precision": 1, "recall": 1}
