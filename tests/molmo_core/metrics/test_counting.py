"""The number a reply states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.metrics import Truth, metric
from molmo_core.metrics.counting import parse_count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Counting the <points x1="1" y1="2" alt="dog">dog</points> shows a total of 12.', 12),
        ("There are three", 3),
        ("7", 7),
        ("There are none.", 0),
        ("a total of two dogs", 2),
        ("Seventeen.", 17),
        ("many", None),
        ("", None),
        ("3 dogs", None),
        ("9" * 5000, None),
    ],
)
def test_parse_count(text, expected):
    assert parse_count(text) == expected


def test_correct_close_valid():
    def scored(answer: str, count: int, **settings: float) -> list[float]:
        return list(metric("count", **settings)(answer, Truth(count=count)).values())

    assert scored("five", 5) == [1, 1, 1]
    assert scored("five", 6) == [0, 1, 1]
    assert scored("five", 7) == [0, 0, 1]
    assert scored("some", 0) == [0, 0, 0]
    assert scored("38", 40, close_share=0.05) == [0, 1, 1], "1 + 5 % of 40 rounded down: within 3"
    assert scored("36", 40, close_share=0.05) == [0, 0, 1]


@given(st.text(max_size=100) | st.text(alphabet="0123456789²①一٣ aot f.", max_size=100))
def test_any_text_states_a_number_or_none(text):
    count = parse_count(text)
    assert count is None or 0 <= count < 10**18
