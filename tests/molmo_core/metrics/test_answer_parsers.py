"""Whatever a model writes is scored: no text raises, none takes long (the time limit is that of one test)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.metrics import Target, Truth, metric, names
from molmo_core.preprocessing.points import complete_tags, extract_points

TRUTH = Truth(
    answers=["7", "12:30"], captions=["a dog"], options=["x", "7"], option=1, option_names="AB", count=7, targets=[Target(1, 1)],
    tracks=[Target(1, 1, 0.0, object=1)], spans=[(0, 1)],
)  # fmt: skip
PIECES = [
    "<point", "<points", "<tracks", ' x="', ' y="', " x1=", ' y1="', "coords=", '"', ">", "</point>", "</points>", "</tracks>",
    "1 1 500 500", ";", "\t", "0.5", "1" * 30, "9" * 5000, "(", ")", ",", "p=", "500", "²", "٣", " ", "\n", "a total of ", "Answer:",
    "The answer is ",
    "B", ".", "A", "12:30", "2 - 7", "to", "-", "%", "nan", "inf", "1e999", "-0", "one", "\x00", "\ud800", "alt=",
]  # fmt: skip


@pytest.mark.parametrize("name", names())
@settings(max_examples=25, deadline=None)
@given(answer=st.lists(st.sampled_from(PIECES) | st.characters(), max_size=20).map("".join))
def test_any_text_is_scored(name, answer):
    scores = metric(name)(answer, TRUTH)
    assert all(0 <= score <= 1 for score in scores.values()), scores


LONG = [
    "<points ", "<points coords=", '<points coords="', "1 1 500 500 ", "1 1 500 500;", "<point x=", "x1=", "x= ", "( ", "(1", "(1,",
    "p=", "1", "1,111,", ";1", "1 ", " ", "\t", "a ", "A) ", "(A", "Answer:", "the ", "12:", "1-", "1 to ", "a total of ", "\n",
    "</points>", "<tracks></tracks>",
    '"', "é", "%", "[", "don't ",
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", LONG)
def test_long_texts_take_no_time(piece):
    answer = piece * (50_000 // len(piece))
    for name in names():
        metric(name)(answer, TRUTH)
    for start in ("", '<points coords="', '<point x1="1', "x=", "("):
        extract_points(start + answer, 10, 10)
        list(complete_tags(start + answer))


def test_numbers_that_are_too_long_are_no_points():
    assert extract_points(f'<points coords="1 {"9" * 5000} 500 500">a</points>', 10, 10) == []
    assert extract_points(f'<point x{"9" * 5000}="1" y{"9" * 5000}="1">a</point>', 10, 10) == []
