"""Means with bootstrap intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.metrics import Figure, paired_difference, summarise
from molmo_core.metrics import figures as module


def test_interval_of_a_share_is_the_binomials():
    """Of 400 answers half are right: the standard error is 0.025, so the interval is about 0.5 ± 0.049."""
    figure = summarise({"a": [0.0, 1.0] * 200}, seed=3)["a"]
    assert (figure.mean, figure.n) == (0.5, 400)
    assert figure.low == pytest.approx(0.451, abs=0.008)
    assert figure.high == pytest.approx(0.549, abs=0.008)


def test_seeded_and_independent_of_other_lists_and_of_the_block_size(monkeypatch):
    scores = np.random.default_rng(0).random(300).tolist()
    alone = summarise({"a": scores}, 1)
    assert summarise({"b": [1.0], "a": scores}, 1)["a"] == alone["a"]
    assert summarise({"a": scores}, 2) != alone
    monkeypatch.setattr(module, "_BLOCK", 1)
    assert summarise({"a": scores}, 1) == alone


def test_single_and_equal_scores():
    assert summarise({"a": [0.25]}, 0) == {"a": Figure(0.25, 0.25, 0.25, 1)}
    assert summarise({"a": [1] * 50}, 0) == {"a": Figure(1, 1, 1, 50)}


def test_pairs_see_what_two_intervals_hide():
    """b is a with 3 of 200 answers lost: both intervals overlap widely, the difference of the pairs is surely positive."""
    a = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    b = a.copy()
    b[np.flatnonzero(a)[:10]] = 0
    difference, low, high = paired_difference(a.tolist(), b.tolist())
    assert difference == pytest.approx(0.05)
    assert 0 < low < difference < high < 0.1
    both = summarise({"a": a.tolist(), "b": b.tolist()}, 0)
    assert both["b"].high > both["a"].low
    assert paired_difference(a, a) == (0, 0, 0)


def test_groups_are_drawn_whole():
    """Ten questions about each of forty pictures that are all answered alike know no more than one question about each."""
    pictures = np.random.default_rng(0).integers(0, 2, 40).astype(float)
    one = summarise({"a": pictures}, 0)["a"]
    repeated, numbers = np.repeat(pictures, 10), np.repeat(np.arange(40), 10)
    ten = summarise({"a": repeated}, 0, numbers)["a"]
    assert ten[:3] == pytest.approx(one[:3])
    assert ten.n == 400
    wrong = summarise({"a": repeated}, 0)["a"]
    assert wrong.high - wrong.low < (ten.high - ten.low) / 2
    alone = summarise({"a": pictures}, 0, np.arange(40)[::-1])["a"]
    assert alone.high - alone.low == pytest.approx(one.high - one.low, rel=0.15), "groups of one are the answers"
    assert paired_difference(repeated, 1 - repeated, 0, numbers) == pytest.approx(paired_difference(pictures, 1 - pictures))
    with pytest.raises(ValueError, match="400 scores and 2 groups"):
        summarise({"a": repeated}, 0, [1, 2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_interval_is_within_the_scores(scores):
    figure = summarise({"a": scores}, 0)["a"]
    assert min(scores) - 1e-12 <= figure.low <= figure.high <= max(scores) + 1e-12


def test_what_cannot_be_summarised():
    with pytest.raises(ValueError, match="a: a list of at least one"):
        summarise({"a": []}, 0)
    with pytest.raises(ValueError, match="a: score 1 is not a finite"):
        summarise({"a": [1, float("nan")]}, 0)
    with pytest.raises(ValueError, match="found 2 and 1"):
        paired_difference([1, 2], [1])
