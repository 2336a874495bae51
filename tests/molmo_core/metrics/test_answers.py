"""Metrics of short answers against cases worked out by hand from the benchmarks' rules."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.metrics import Truth, metric
from molmo_core.metrics.answers import clean_prediction, normalise_answer, numbers, similarity


def scored(name: str, prediction: str, *answers: str, **settings) -> dict:
    return metric(name, **settings)(prediction, Truth(answers=answers))


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
    for prediction, share in (("Red.", 2 / 3), ("the dark red", 1), ("maroon", 1), ("blue", 0)):
        assert scored("vqa_score", prediction, *answers)["vqa_score"] == pytest.approx(share)
    assert scored("vqa_score", "two", "2")["vqa_score"] == 1, "one reference answer is enough when there is only one"


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_leave_one_out_of_ten(given, expected):
    """VQAEval's figures: of ten annotators three agree; for each of the three two others do (2/3), for the other seven three (1): 0.9."""
    answers = ["red"] * given + ["blue"] * (10 - given)
    assert scored("vqa_score", "red", *answers)["vqa_score_leave_one_out"] == pytest.approx(expected)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_leave_one_out_is_the_mean_over_annotators(answers):
    sets = list(itertools.combinations(answers, len(answers) - 1)) if len(answers) > 1 else [tuple(answers)]
    mean = sum(min(rest.count("b") / min(3, len(rest)), 1) for rest in sets) / len(sets)
    assert scored("vqa_score", "b", *answers)["vqa_score_leave_one_out"] == pytest.approx(mean)


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
    assert scored("exact_match", " Yes", "no", "yes") == {"exact_match": 1}
    assert scored("exact_match", "yes.", "yes") == {"exact_match": 0}


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("104", "100", 1),
        ("105", "100", 1),
        ("106", "100", 0),
        ("95", "100", 1),
        ("12%", "0.12", 1),
        ("0.13", "12%", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("-97", "-100", 1),
        ("Brazil", "brazil", 1),
        ("100", "brazil", 0),
        ("nan", "5", 0),
        ("inf", "5", 0),
        ("about 100", "100", 0),
    ],
)
def test_relaxed_accuracy(prediction, answer, expected):
    assert scored("relaxed_accuracy", prediction, answer)["relaxed_accuracy"] == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("It is about 1,040 people.", "1000", 1),
        ("It is about 1,060 people.", "1000", 0),
        ("12", "0.12", 1),
        ("12", "12%", 1),
        ("The largest country is Brazil.", "Brazil", 1),
        ("Brasil", "Brazil", 0),
        ("3 and 5", "[3, 5]", 1),
        ("3 and 6", "[3, 5]", 0),
        ("red, blue", "['red', 'blue']", 1),
        ("no number", "7", 0),
    ],
)
def test_relaxed_accuracy_in_text(prediction, answer, expected):
    assert scored("relaxed_accuracy", prediction, answer)["relaxed_accuracy_in_text"] == expected


def test_numbers():
    assert numbers("From -1,234.5 to 2020, 12% of 3x and 1.2; a1 +7.") == [-1234.5, 2020, 12, 1.2, 7]


def test_anls():
    assert scored("anls", "Hello", "hello") == {"anls": 1, "exact_match": 1}
    assert scored("anls", "hallo", "hello", "help")["anls"] == pytest.approx(0.8)
    assert scored("anls", "abc", "xyz")["anls"] == 0
    assert scored("anls", "ab", "abcd")["anls"] == 0, "half of the characters missing is at the threshold, not below it"
    assert scored("anls", "ab", "abcd", threshold=0.6)["anls"] == 0.5
    assert similarity("", "") == 1


@given(st.text("ab", max_size=7), st.text("abc", max_size=7))
def test_similarity_is_of_the_edit_distance(a, b):
    """Against the textbook's recursion."""

    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert similarity(a, b, 1.0) == pytest.approx(1 - distance(len(a), len(b)) / max(len(a), len(b), 1))
