"""Metrics by name, their settings, and which one fits."""

import pytest

from molmo_core.metrics import Target, Truth, TruthMissing, UnknownMetric, metric, metric_for, names, register

FULL = Truth(
    answers=["7"], captions=["a dog"], options=["x", "7"], option=1, option_names="AB", count=7, targets=[Target(1, 1)],
    tracks=[Target(1, 1, 0.0, object=1)], spans=[(0, 1)],
)  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_every_metric_scores_from_0_to_1_with_its_main_score_first(name):
    found = metric(name)
    for answer in ("7", "", '<points coords="1 1 010 010">a</points>'):
        scores = found(answer, FULL)
        assert next(iter(scores)) == found.main
        assert all(0 <= score <= 1 for score in scores.values())
    with pytest.raises(TruthMissing, match=f"{name} needs"):
        found("7", Truth())


def test_unknown_names_and_settings():
    with pytest.raises(UnknownMetric, match=r"'vqa_scor' \(did you mean vqa_score\?\); there are anls, "):
        metric("vqa_scor")
    with pytest.raises(UnknownMetric, match=r"no setting 'radios' \(did you mean radius\?\); it has radius"):
        metric("pointing", radios=1)
    with pytest.raises(UnknownMetric, match="it has none"):
        metric("exact_match", radius=1)
    with pytest.raises(ValueError, match="two metrics are called anls"):
        register("anls", main="anls", needs=())(lambda answer, truth: {})


@pytest.mark.parametrize(
    ("truth", "name"),
    [
        (Truth(answers=["a"], options=["a", "b"], option=0), "multiple_choice"),
        (Truth(answers=["2"], targets=[Target(1, 1)], count=1), "pointing"),
        (Truth(answers=["0"], targets=[], count=0), "pointing"),
        (Truth(answers=["2"], count=2), "count"),
        (Truth(answers=["a"] * 10), "vqa_score"),
        (Truth(answers=["a"]), "vqa_score"),
    ],
)
def test_what_fits(truth, name):
    assert metric_for(truth) == name


def test_nothing_fits_nothing():
    with pytest.raises(TruthMissing, match="none of option"):
        metric_for(Truth(options=["a", "b"]))
