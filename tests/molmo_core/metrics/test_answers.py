"""Answer metrics against cases worked out by hand from the benchmarks' rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.metrics import anls, clean_prediction, exact_match, multiple_choice, normalise_answer, relaxed_accuracy, vqa_score
from molmo_core.metrics.answers import edit_distance


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red   Car.", "red car"),
        ("two", "2"),
        ("None", "0"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("1,000", "1000"),
        ("on\nthe\ttable", "on table"),
        ("a", ""),
        ("yes!", "yes"),
    ],
)
def test_official_normalisation(text, expected):
    assert normalise_answer(text) == expected


def test_vqa_score_counts_annotators():
    answers = ["red"] * 2 + ["dark red"] * 5 + ["maroon"] * 3
    assert vqa_score("Red.", answers) == pytest.approx(2 / 3)
    assert vqa_score("the dark red", answers) == 1
    assert vqa_score("maroon", answers) == 1
    assert vqa_score("blue", answers) == 0
    assert vqa_score("two", ["2"]) == 1, "one reference answer is enough when there is only one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  red ", "red"),
        ("It is round, so. Answer: circle", "circle"),
        ("red\nblue\nred \n", "red"),
        ("a  b\n\n a b\nc", "a b"),
        ("", ""),
    ],
)
def test_cleaning(text, expected):
    assert clean_prediction(text) == expected


def test_exact_match_ignores_case_only():
    assert exact_match(" Yes", ["yes"]) == 1
    assert exact_match("yes.", ["yes"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("104", "100", 1),
        ("106", "100", 0),
        ("95", "100", 1),
        ("12%", "0.12", 1),
        ("0.13", "12%", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("-97", "-100", 1),
        ("Brazil", "brazil", 1),
        ("100", "brazil", 0),
    ],
)
def test_relaxed_accuracy(prediction, answer, expected):
    assert relaxed_accuracy(prediction, [answer]) == expected


def test_anls():
    assert anls("Hello", ["hello"]) == 1
    assert anls("hallo", ["hello", "help"]) == pytest.approx(0.8)
    assert anls("abc", ["xyz"]) == 0
    assert anls("ab", ["abcd"]) == 0, "half of the characters missing is at the threshold, not below it"


def test_multiple_choice():
    options = ["a red circle", "a blue square", "both"]
    assert multiple_choice("Both", options) == 2
    assert multiple_choice("square", options) == 1
    assert multiple_choice("a", options) == 2, "two contain it, the third is the nearest"
    assert multiple_choice("a rad circla", options) == 0


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
