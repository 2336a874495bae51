"""The number a reply states."""

import pytest

from molmo_core.metrics import count_score, parse_count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Counting the <points x1="1" y1="2" alt="dog">dog</points> shows a total of 12.', 12),
        ("There are three", 3),
        ("7", 7),
        ("There are none.", 0),
        ("a total of two dogs", 2),
        ("many", None),
        ("", None),
        ("3 dogs", None),
    ],
)
def test_parse_count(text, expected):
    assert parse_count(text) == expected


def test_correct_and_close():
    assert count_score("five", 5) == 1
    assert count_score("five", 6) == 0
    assert count_score("five", 6, tolerance=1) == 1
    assert count_score("some", 0, tolerance=1) == 0
