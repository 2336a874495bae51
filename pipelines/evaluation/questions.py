"""From a record to questions with reference answers, and from an answer to its score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from molmo_core.metrics import Metric, Truth, metric, metric_for
from pipelines.data.rejects import Rejected
from pipelines.evaluation.config import ScoringConfig
from pipelines.evaluation.truth import complete, truth_of

_MEDIA = ("image", "images", "video", "clip_start", "clip_end", "subtitle")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a record."""

    task: dict[str, Any]
    """The record's fields without its media; of a chat without the last answer. What a preprocessor takes at inference."""
    text: str
    answers: list[str]
    """Reference answers."""
    type: str


def media_of(example: dict[str, Any]) -> dict[str, Any]:
    """The media of a record as it was read."""
    return {key: example[key] for key in _MEDIA if key in example}


def questions(example: dict[str, Any]) -> list[Question]:
    """The questions of a record as it was read.

    Raises:
        Rejected: no question, or one without an answer.
    """
    shared = {key: value for key, value in example.items() if key not in (*_MEDIA, "message_list", "metadata")}
    if not example.get("message_list", True):
        raise Rejected("record: no question", "message_list is empty")
    # What only an evaluation reads: no field of a task, so that no preprocessor can show it to the model.
    if isinstance(truth := example.get("metadata", {}).get("truth"), dict):
        shared["truth"] = truth
    return [_question({**shared, **annotation}) for annotation in example.get("message_list", [{}])]


def _question(task: dict[str, Any]) -> Question:
    kind = str(task.get("type") or task.get("style") or "demo")
    if "messages" in task:
        texts = [m["content"] if isinstance(m, dict) else m for m in task["messages"]]
        if len(texts) < 2 or len(texts) % 2:
            raise Rejected("record: no answer", "messages must end with the assistant's, which is the reference")
        return Question({**task, "messages": task["messages"][:-1]}, texts[-2], [texts[-1]], kind)
    text = str(task.get("question") or task.get("label") or kind)
    return Question(task, text, _answers(task), kind)


def _answers(task: dict[str, Any]) -> list[str]:
    for key in ("answers", "answer", "text", "count"):
        if task.get(key) is not None:
            value = task[key]
            return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    options = _options(task)
    if options and task.get("answer_idx") is not None:
        return [options[task["answer_idx"]]]
    if task.get("points") is not None:
        return [str(len(task["points"]))]
    if not {"boxes", "masks", "spans"}.isdisjoint(task.get("truth", {})):
        return []
    raise Rejected("record: no answer", f"none of answer, answers, answer_idx, text, count, points; fields: {sorted(task)}")


def _options(task: dict[str, Any]) -> list[str]:
    return [str(option) for option in task.get("options") or task.get("unlabelled_options") or ()]


@dataclasses.dataclass(frozen=True)
class Judge:
    """How the answers to a question are scored: its metric, and what that compares with."""

    metric: Metric
    truth: Truth

    def __call__(self, answer: str) -> dict[str, float]:
        """The metric's scores of an answer by name, each 0 to 1."""
        return self.metric(answer, self.truth)

    def score(self, answer: str) -> float:
        """The main one of them."""
        return self(answer)[self.metric.main]


def judge(question: Question, config: ScoringConfig, image_sizes: Sequence[tuple[int, int]]) -> Judge:
    """How a question is scored: by the metric of its type, else the configuration's, else the one that fits the record.

    Args:
        image_sizes: (width, height) of the images, or of a video's frames; they give points their scale.

    Raises:
        Rejected: the record has nothing that a metric could compare with.
    """
    try:
        truth = truth_of(question.task, question.answers, image_sizes)
        name = config.metrics.get(question.type, config.metric) or metric_for(truth)
        measure = metric(name, **({"radius": config.point_radius} if name in ("pointing", "point_in_box", "tracking") else {}))
        found = Judge(measure, complete(truth, measure))
        measure.check(found.truth)
    except ValueError as error:  # also of points that are not in the image
        raise Rejected("record: no answer", str(error)) from None
    return found
