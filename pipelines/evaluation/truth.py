"""From a record's fields to what its answer is compared with."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from molmo_core.metrics import Box, Metric, Target, Truth
from molmo_core.metrics.counting import parse_count
from molmo_core.metrics.pointing import written_points
from molmo_core.metrics.temporal import written_spans
from molmo_core.preprocessing.given_points import STYLE, after, given_point
from molmo_core.preprocessing.points import percent

Size = tuple[int, int]


def truth_of(task: dict[str, Any], answers: Sequence[str], image_sizes: Sequence[Size]) -> Truth:
    """The truth of a question.

    Args:
        task: the record's fields, as `records.reading` gives them, with what its `metadata.truth` adds as `truth`: `boxes` ([x0, y0, x1,
            y1] in pixels), `masks` (of as many points, if there are points), `spans` ([start, end] in seconds), `category`.
        answers: the question's reference answers.
        image_sizes: (width, height) of the images or of the video's frames.

    Raises:
        ValueError: points outside the image.
    """
    options = [str(option) for option in task.get("options") or task.get("unlabelled_options") or ()]
    names = task.get("option_names", string.ascii_uppercase) if "unlabelled_options" not in task else ()
    targets = _targets(task, image_sizes)
    added = task.get("truth", {})
    if targets is None or "boxes" in added or "masks" in added:
        targets = _areas(added.get("boxes"), added.get("masks"), targets)
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
        spans=[(float(start), float(end)) for start, end in added["spans"]] if "spans" in added else None,
        image_sizes=tuple(image_sizes),
        category=None if added.get("category") is None else str(added["category"]),
    )


def complete(truth: Truth, metric: Metric) -> Truth:
    """With what a metric needs and the record gives only as answers: the number, the points or the
    moments that the first of them states; answers for captions."""
    parts: dict[str, Any] = {}
    if truth.answers and "count" in metric.needs and truth.count is None:
        parts["count"] = parse_count(truth.answers[0])
    if truth.answers and "targets" in metric.needs and truth.targets is None:
        parts["targets"] = written_points(truth.answers[0], truth)
    if truth.answers and "captions" in metric.needs and not truth.captions:
        parts["captions"] = truth.answers
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


def _areas(boxes: Any, masks: Any, points: list[Target] | None) -> list[Target] | None:
    """Targets with their boxes and masks; without points, at the middle of these."""
    given = [area for area in (boxes, masks, points) if area is not None]
    if not given:
        return None
    if len({len(area) for area in given}) > 1:
        raise ValueError(f"boxes, masks and points of one record are as many as each other, found {[len(area) for area in given]}")
    targets = []
    for i in range(len(given[0])):
        box = None if boxes is None else (float(boxes[i][0]), float(boxes[i][1]), float(boxes[i][2]), float(boxes[i][3]))
        mask = None if masks is None else np.asarray(masks[i], bool)
        x, y = points[i][:2] if points is not None else _middle(box, mask)
        targets.append(Target(x, y, None if points is None else points[i].at, mask, box))
    return targets


def _middle(box: Box | None, mask: np.ndarray | None) -> tuple[float, float]:
    if box is not None:
        return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    assert mask is not None
    rows, columns = np.nonzero(mask)
    return (float(columns.mean()) + 0.5, float(rows.mean()) + 0.5) if len(rows) else (0.0, 0.0)


def _tracks(task: dict[str, Any], sizes: Sequence[Size]) -> list[Target] | None:
    if task.get("tracks") is None:
        return None
    if STYLE in str(task.get("style", "")):
        task = after(given_point(task), task)
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
