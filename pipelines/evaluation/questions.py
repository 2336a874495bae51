"""From a record to questions with reference answers, and from an answer to its score."""

from __future__ import annotations

import dataclasses
import re
import string
from typing import Any

from molmo_core import metrics
from molmo_core.preprocessing.points import extract_points, percent
from pipelines.data.rejects import Rejected
from pipelines.evaluation.config import Metric, ScoringConfig

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
        Rejected: a question without an answer.
    """
    shared = {key: value for key, value in example.items() if key not in (*_MEDIA, "message_list", "metadata")}
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
    raise Rejected("record: no answer", f"none of answer, answers, answer_idx, text, count, points; fields: {sorted(task)}")


def _options(task: dict[str, Any]) -> list[str]:
    return [str(option) for option in task.get("options") or task.get("unlabelled_options") or ()]


def metric_of(question: Question, config: ScoringConfig) -> Metric:
    """The metric of a question's type."""
    return config.metrics.get(question.type, config.metric)


def score(question: Question, prediction: str, config: ScoringConfig, image_size: tuple[int, int]) -> float:
    """How good an answer is, 0 to 1. `image_size` is (width, height); it gives points their scale."""
    metric = metric_of(question, config)
    if metric == "pointing":
        found = [(p.x, p.y) for p in extract_points(prediction, *image_size)]
        return metrics.pointing_score(found, _points(question, image_size), config.point_radius * image_size[0]).f1
    answer = metrics.clean_prediction(prediction)
    if metric == "count":
        target = metrics.parse_count(question.answers[0])
        return 0.0 if target is None else metrics.count_score(prediction, target)
    if metric == "multiple_choice":
        options = _options(question.task)
        return float(options[_chosen(answer, options, question.task)] == question.answers[0])
    return float(getattr(metrics, metric)(answer, question.answers))


def _points(question: Question, image_size: tuple[int, int]) -> list[tuple[float, float]]:
    """The true points in pixels: given as numbers, or written in the reference answer."""
    width, height = image_size
    if question.task.get("points") is not None:
        shares = percent(question.task["points"], question.task.get("point_scale"), image_size)
        return [(x * width / 100, y * height / 100) for x, y in shares]
    return [(p.x, p.y) for p in extract_points(question.answers[0], width, height)]


def _chosen(answer: str, options: list[str], task: dict[str, Any]) -> int:
    """The option an answer means: by its letter, else by its text."""
    if "unlabelled_options" not in task:
        names = [str(name) for name in task.get("option_names", string.ascii_uppercase)][: len(options)]
        letter = re.match(r"\(?(\w+)\)?(?:[.:)\s]|$)", answer)
        if letter and letter[1] in names:
            return names.index(letter[1])
    return metrics.multiple_choice(answer, options)
