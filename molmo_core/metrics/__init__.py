"""Answer metrics: visual question answering, counting and pointing. Each scores one prediction, 0 (wrong) to 1 (right)."""

from molmo_core.metrics.answers import (
    anls,
    clean_prediction,
    exact_match,
    multiple_choice,
    normalise_answer,
    relaxed_accuracy,
    vqa_score,
)
from molmo_core.metrics.counting import count_score, parse_count
from molmo_core.metrics.pointing import PointingScore, pointing_score

__all__ = [
    "PointingScore",
    "anls",
    "clean_prediction",
    "count_score",
    "exact_match",
    "multiple_choice",
    "normalise_answer",
    "parse_count",
    "pointing_score",
    "relaxed_accuracy",
    "vqa_score",
]
