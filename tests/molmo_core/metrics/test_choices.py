"""Which option an answer means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.metrics import Truth, TruthMissing, metric
from molmo_core.metrics.choices import chosen_letter, chosen_option, nearest_option

OPTIONS = ["a red circle", "a blue square", "both"]


def test_by_text():
    assert nearest_option("Both", OPTIONS) == 2
    assert nearest_option("square", OPTIONS) == 1
    assert nearest_option("a", OPTIONS) == 2, "two contain it, the third is the nearest"
    assert nearest_option("a rad circla", OPTIONS) == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B: blue", 1),
        ("**B**", 1),
        ("B) a blue square", 1),
        ("The answer is B", 1),
        ("The correct answer is (B).", 1),
        ("My answer: B", 1),
        ("Option B", 1),
        ("It can only be (B), as said.", 1),
        ("Either (A) or (B)", None),
        ("D", None),
        ("blue", None),
        ("", None),
    ],
)
def test_by_letter(answer, letter):
    found = chosen_letter(answer, ["A", "B", "C"])
    assert (found and found[0]) == letter


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("A red circle", 0),
        ("A blue square", 1),
        ("A", 0),
        ("C both", 2),
        ("B blue, I think", 1),
        ("A. a blue square", 0),
        ("the bleu square", 1),
    ],
)
def test_a_letter_that_may_be_an_article_yields_to_the_text(answer, option):
    assert chosen_option(answer, OPTIONS, ["A", "B", "C"]) == option


def test_metrics():
    truth = Truth(options=OPTIONS, option=1, option_names="ABC")
    assert metric("multiple_choice")("B", truth) == {"accuracy": 1}
    assert metric("multiple_choice")("The reply is long.\nAnswer: a blue square", truth) == {"accuracy": 1}
    assert metric("multiple_choice_text")("square", truth) == {"accuracy": 1}
    assert metric("multiple_choice_letter")("B", truth) == {"accuracy": 1, "valid": 1}
    assert metric("multiple_choice_letter")("the blue one", truth) == {"accuracy": 0, "valid": 0}
    assert metric("multiple_choice")("yes", Truth(options=["yes", "yes"], option=1)) == {"accuracy": 1}, "options of equal text"
    with pytest.raises(TruthMissing, match="option_names"):
        metric("multiple_choice_letter")("B", Truth(options=OPTIONS, option=1))


def test_options_whose_names_are_options():
    """The text "2" is option A, whatever the letters say; "B" is the letter where it is also some option's text."""
    assert chosen_option("2", ["2", "3"], ["A", "B"]) == 0
    assert chosen_option("B", ["B", "A"], ["A", "B"]) == 1


@given(st.text(max_size=80), st.lists(st.text(max_size=10), min_size=1, max_size=5))
def test_any_answer_means_an_option(answer, options):
    assert 0 <= chosen_option(answer, options, "ABCDE"[: len(options)]) < len(options)
