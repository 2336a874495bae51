"""Benchmarks that mix letters, options, numbers and words."""

import pytest

from molmo_core.metrics import Truth, metric


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("7.50", "7.5", 1),
        ("2 and 3 give 5", "5", 1),
        ("5 is the number of 3 objects", "5", 0),
        ("1,000", "1000", 1),
        ("0.333", "0.33", 1),
        ("-4", "-4", 1),
        ("4", "-4", 0),
        ("It is the Mona Lisa.", "mona lisa", 1),
        ("monalisa", "mona lisa", 0),
        ("scattered", "cat", 0),
        ("nothing", "", 0),
    ],
)
def test_open(prediction, reference, expected):
    assert metric("choice_or_open")(prediction, Truth(answers=[reference])) == {"correct": expected}


def test_choice():
    truth = Truth(answers=["4"], options=["3", "4"], option=1, option_names="AB")
    assert metric("choice_or_open")("B", truth) == {"correct": 1}
    assert metric("choice_or_open")("A", truth) == {"correct": 0}


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("B", "B", 1),
        ("(B) the left one", "B", 1),
        ("b.", "(B)", 1),
        ("The left one", "B", 0),
        ("C", "B", 0),
        ("Two.", "2", 1),
        ("no", "No", 1),
    ],
)
def test_letter_or_text(prediction, reference, expected):
    assert metric("letter_or_text")(prediction, Truth(answers=[reference])) == {"correct": expected}
