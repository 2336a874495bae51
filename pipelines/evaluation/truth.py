"""From a record's fields to what its answer is compared with."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable, Sequence
from typing import Any

from molmo_core.metrics import Metric, Target, Truth
from molmo_core.metrics.counting import parse_count
from molmo_core.metrics.pointing import written_points
from molmo_core.metrics.temporal import written_spans
from molmo_core.preprocessing.points import percent

Size = tuple[int, int]


def truth_of(task: dict[str, Any], answers: Sequence[str], image_sizes: Sequence[Size]) -> Truth:
    """The truth of a question.

    Args:
        task: the record's fields, as `records.reading` gives them.
        answers: the question's reference answers.
        image_sizes: (width, height) of the images or of the video's frames.

    Raises:
        ValueError: points outside the image.
    """
    options = [str(option) for option in task.get("options") or task.get("unlabelled_options") or ()]
    names = task.get("option_names", string.ascii_uppercase) if "unlabelled_options" not in task else ()
    targets = _targets(task, image_sizes)
    count = task.get("count", None if targets is None else len(targets))
    return Truth(
        answers=tuple(answers),
        captions=tuple(answers) if "text" in task else (),
        options=tuple(options),
        option=task.get("answer_idx") if options else None,
        option_names=tuple(str(name) for name in names)[: len(options)],
        count=None if count is None else int(count),
        targets=targets,
        tracks=_tracks(task, image_sizes),
        image_sizes=tuple(image_sizes),
        category=None if task.get("category") is None else str(task["category"]),
    )


def complete(truth: Truth, metric: Metric) -> Truth:
    """With what a metric needs and the record gives only in words: the number, the points or the
    moments that the first reference answer states."""
    parts: dict[str, Any] = {}
    if truth.answers and "count" in metric.needs and truth.count is None:
        parts["count"] = parse_count(truth.answers[0])
    if truth.answers and "targets" in metric.needs and truth.targets is None:
        parts["targets"] = written_points(truth.answers[0], truth)
    if truth.answers and "spans" in metric.needs and truth.spans is None:
        parts["spans"] = written_spans(truth.answers[0]) or None
    return dataclasses.replace(truth, **parts)


def _targets(task: dict[str, Any], sizes: Sequence[Size]) -> list[Target] | None:
    if task.get("image_points") is not None:
        numbered = zip(task["image_points"], sizes, strict=True)
        return [target for k, (points, size) in enumerate(numbered, 1) for target in _pixels(points, task, size, float(k))]
    if task.get("points") is None:
        return None
    if task.get("timestamps") is not None:
        timed = zip(task["timestamps"], task["points"], strict=True)
        return [target for seconds, points in timed for target in _pixels(points, task, sizes[0], float(seconds))]
    return _pixels(task["points"], task, sizes[0])


def _tracks(task: dict[str, Any], sizes: Sequence[Size]) -> list[Target] | None:
    if task.get("tracks") is None:
        return None
    return [
        target._replace(object=name)
        for seconds, objects in zip(task["timestamps"], task["tracks"], strict=True)
        for name, point in objects.items()
        if point is not None
        for target in _pixels([point], task, sizes[0], float(seconds))
    ]


def _pixels(points: Iterable[Sequence[float]], task: dict[str, Any], size: Size, at: float | None = None) -> list[Target]:
    """Points of one image or frame, at the place where they are."""
    width, height = size
    return [Target(float(x * width / 100), float(y * height / 100), at) for x, y in percent(points, task.get("point_scale"), size)]
