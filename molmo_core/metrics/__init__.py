"""Answer metrics by name: `metric("vqa_score")(answer, truth)` gives the scores of one answer, 0 (wrong) to 1 (right).

truth       what an answer is compared with
registry    the metrics by name, and which fits a record
figures     means with confidence intervals, the difference of two models
answers, choices, counting, pointing    the metrics
"""

from molmo_core.metrics import (  # they register their metrics
    answers,
    captions,
    choices,
    counting,
    open_answers,
    pointing,
    temporal,
    tracking,
)
from molmo_core.metrics.figures import Figure, paired_difference, summarise
from molmo_core.metrics.registry import Metric, TruthMissing, UnknownMetric, metric, metric_for, names, register
from molmo_core.metrics.truth import Box, Target, Truth

__all__ = [
    "Box",
    "Figure",
    "Metric",
    "Target",
    "Truth",
    "TruthMissing",
    "UnknownMetric",
    "answers",
    "captions",
    "choices",
    "counting",
    "metric",
    "metric_for",
    "names",
    "open_answers",
    "paired_difference",
    "pointing",
    "register",
    "summarise",
    "temporal",
    "tracking",
]
