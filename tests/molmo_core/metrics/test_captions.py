"""Captions, by values worked out by hand, and by those of pycocoevalcap 1.2 (its scorers of BLEU and CIDEr, without its Java parts)."""

import math
import random

import numpy as np
import pytest

from molmo_core.metrics import Truth, metric
from molmo_core.metrics.captions import bleu, bleu_statistics, cider, words


def bleu_of(candidate: str, *references: str) -> float:
    return float(bleu(np.array([bleu_statistics(candidate.split(), [reference.split() for reference in references])]))[0])


def test_words():
    assert words("A dog's well-fed; it's 3.5 m.") == ["a", "dog's", "well-fed", "it's", "3", "5", "m"]


def test_rouge_l():
    """The longest common subsequence of "a b c d" and "a c e" is "a c": precision 2/4, recall 2/3."""
    precision, recall, weight = 0.5, 2 / 3, 1.44
    expected = (1 + weight) * precision * recall / (recall + weight * precision)
    assert metric("caption")("A b c d.", Truth(captions=["a c e", "x"])) == {"rouge_l": pytest.approx(expected)}
    assert metric("caption")("", Truth(captions=["a"])) == {"rouge_l": 0}


def test_bleu():
    """Of runs of 1 to 4 words 4/5, 3/4, 2/3, 1/2 match: their product is 1/5. A short candidate pays exp(1 - 5/4)."""
    assert bleu_of("a b c d e", "a b c d f") == pytest.approx(0.2**0.25)
    assert bleu_of("a b c d", "a b c d e") == pytest.approx(math.exp(-0.25))
    assert bleu_of("a b c d", "a b c d e f g", "x y z w") == 1, "the reference of the nearest length"
    assert bleu_of("a b c", "a b c") == 0, "no run of four words"
    assert bleu_statistics(["a", "a", "a"], [["a", "a"]])[0] == 2, "a word counts as often as a reference has it"
    assert bleu_of("", "a") == 0


def test_cider():
    """Two pictures, so a run in one of them weighs ln 2: equal captions of two words agree in runs of 1 and 2, not of 3 and 4: 10 · 2/4."""
    assert cider([["a", "b"], ["x"]], [[["a", "b"]], [["c", "d"]]]) == pytest.approx([5, 0])
    assert cider([["a", "b"]], [[["a", "b"]]]) == [0], "in a set of one nothing is rare"
    # Two references, one of them unlike: the mean over both. One run of two words less: exp(-1 / 72).
    assert cider([["a", "b"], []], [[["a", "b"], ["x", "y"]], [["c"]]])[0] == pytest.approx(2.5)
    assert cider([["a", "b"], []], [[["a", "b", "a"]], [["c"]]])[0] == pytest.approx(
        10 / 4 * math.exp(-1 / 72) * (3 / math.sqrt(10) + 1 / math.sqrt(2))
    )


def test_a_set_as_pycocoevalcap_scores_it():
    draw = random.Random(0)
    vocabulary = ["a", "the", "dog", "cat", "sat", "on", "mat", "runs", "red", "big", "house", "tree", "in", "of"]

    def sentence() -> str:
        return " ".join(draw.choice(vocabulary) for _ in range(draw.randint(3, 12)))

    references = [[sentence() for _ in range(draw.randint(1, 5))] for _ in range(40)]
    answers = [first if draw.random() < 0.3 else " ".join(first.split()[:6]) + " " + sentence() for first, *_ in references]
    whole = metric("caption").whole
    figures = whole(answers, [Truth(captions=captions) for captions in references], 0)
    assert figures["cider"].mean == pytest.approx(2.527384002492507, rel=1e-12)
    assert figures["bleu_4"].mean == pytest.approx(0.5099422536705507, rel=1e-8)  # it adds 1e-9 to avoid zeros
    for figure in figures.values():
        assert figure.low < figure.mean < figure.high
        assert figure.n == 40
