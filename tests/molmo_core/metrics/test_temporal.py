"""Moments and clock times as answers write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.metrics import Truth, metric
from molmo_core.metrics.temporal import iou, written_spans, written_time

spans = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda s: (min(s), max(s))), max_size=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.5 - 7", [(2.5, 7)]),
        ("from 2 seconds to 7.25 seconds", [(2, 7.25)]),
        ("It happens between 0:02 and 1:07.", [(2, 67)]),
        ("1:00:00–1:00:30", [(3600, 3630)]),
        ("[2, 7] and [10.0, 12.0]", [(2, 7), (10, 12)]),
        ("3s to 4s, 8s until 9s", [(3, 4), (8, 9)]),
        ("7 - 2", []),
        ("at 5 seconds", []),
        ("", []),
    ],
)
def test_written_spans(text, expected):
    assert written_spans(text) == expected


def test_iou():
    assert iou([(0, 10)], [(5, 15)]) == pytest.approx(1 / 3)
    assert iou([(0, 4), (2, 6)], [(0, 6)]) == 1, "spans of one list may overlap"
    assert iou([(0, 1), (4, 5)], [(0, 5)]) == pytest.approx(0.4)
    assert iou([], [(0, 1)]) == 0
    assert iou([(3, 3)], [(3, 3)]) == 1


@given(spans, spans)
def test_iou_counts_seconds(a, b):
    covered = [{second for start, end in spans for second in range(start, end)} for spans in (a, b)]
    if any(covered):
        assert iou(a, b) == pytest.approx(len(covered[0] & covered[1]) / len(covered[0] | covered[1]))


def test_temporal_metric():
    scores = metric("temporal_iou")("From 0 to 6 seconds.", Truth(spans=[(0, 10)]))
    assert scores == {"iou": pytest.approx(0.6), "iou_at_0.3": 1, "iou_at_0.5": 1, "iou_at_0.7": 0, "valid": 1}
    assert metric("temporal_iou")("never", Truth(spans=[(0, 10)]))["valid"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3:45", (3, 45, None)),
        ("The time is 15:45:10.", (3, 45, 10)),
        ("10.09 pm", (10, 9, None)),
        ("12:00", (0, 0, None)),
        ("25:00 or 4:30", (4, 30, None)),
        ("half past three", None),
        ("1:2:3:4", None),
    ],
)
def test_written_time(text, expected):
    assert written_time(text) == expected


def test_clock():
    def scored(answer: str, right: str, **settings: int) -> list[float]:
        return list(metric("clock", **settings)(answer, Truth(answers=[right])).values())

    assert scored("3:45", "15:45") == [1, 1, 1, 1, 1]
    assert scored("3:42", "3:45") == [0, 1, 1, 0, 1]
    assert scored("3:42", "3:45", tolerance=1) == [0, 0, 1, 0, 1]
    assert scored("11:59", "12:01") == [0, 1, 0, 0, 1], "around the face"
    assert scored("3:45", "3:45:30") == [0, 1, 1, 1, 0, 1]
    assert scored("9:45", "3:45") == [0, 0, 0, 1, 1]
    assert scored("soon", "3:45") == [0, 0, 0, 0, 0]
