"""What a task record may hold: its kinds, told apart by their fields, the values that fit, and which tasks need media.

How a task becomes a prompt and an answer: `tasks`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

TaskKind = Literal["conversation", "multiple choice", "pointing", "question", "caption"]

POINT_STYLES = frozenset({"pointing", "cosyn_point", "point_count", "point_then_count", "count_then_point", "count"})
READ_FIELDS: dict[TaskKind, frozenset[str]] = {
    "conversation": frozenset({"messages"}),
    "multiple choice": frozenset({"question", "options", "unlabelled_options", "option_names", "answer_idx"}),
    "pointing": frozenset({"label", "question", "points", "point_scale", "image_points", "timestamps", "tracks"}),
    "question": frozenset({"question", "answer", "answers", "explanation", "answer_annotations", "point_scale"}),
    "caption": frozenset({"text"}),
}
"""The fields that make up the prompt and the answer of each kind; all others of a record are not read by it."""
COMMON_FIELDS = frozenset({"style", "weight", "message_weight"})
_POINTS = frozenset({"points", "image_points", "tracks"})
_STYLE_WORDS = {
    "video": frozenset({"video", "videos"}),
    "image": frozenset({
        "image", "images", "picture", "photo", "caption", "captions", "captioning", "transcript", "pointing", "point", "vqa", "vqa2",
        "okvqa",
    }),
}  # fmt: skip
"""Words in the name of a style that say what its records cannot be without."""


def task_kind(record: dict[str, Any], style: str) -> TaskKind | None:
    """The kind of a record without null values; None if it is not a task."""
    fields = record.keys()
    if "messages" in fields:
        return "conversation"
    if "options" in fields or "unlabelled_options" in fields:
        return "multiple choice"
    answered = "question" in fields and ("answer" in fields or "answers" in fields)
    if _POINTS & fields or (("label" in fields or style in POINT_STYLES) and not answered):
        return "pointing"
    if "question" in fields:
        return "question"
    return "caption" if "text" in fields or style.endswith(("caption", "transcript")) else None


def medium_needed(record: dict[str, Any], style: str) -> Literal["image", "video"] | None:
    """What a record cannot be without: a video, an image (or a video), or nothing."""
    words = set(re.split(r"[^a-z0-9]+", style.lower()))
    if words & _STYLE_WORDS["video"]:
        return "video"
    seen = style in POINT_STYLES or words & _STYLE_WORDS["image"] or task_kind(record, style) in ("pointing", "caption")
    return "image" if seen else None


_HUGE = 1e300  # JSON has whole numbers that no float holds


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return bool(real and -_HUGE < value < _HUGE)  # not so: NaN and infinities


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool | np.bool_) or _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_answer(value: Any) -> bool:
    if is_list(value):
        return all(map(_is_scalar, value)) and any(str(v).strip() for v in value)
    return _is_scalar(value) and bool(str(value).strip())


def _list_of(fits: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: is_list(value) and len(value) >= least and all(map(fits, value))


def _is_pair(value: Any) -> bool:
    return is_list(value) and len(value) == 2 and all(map(_is_number, value))


def _is_weight(value: Any) -> bool:
    return _is_number(value) and value >= 0


_WEIGHT = "a number, 0 or more"
_is_points = _list_of(_is_pair)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("style", "question", "explanation"), (lambda v: isinstance(v, str), "a string")),
    **dict.fromkeys(("label", "count"), (_is_scalar, "a string or a number")),
    "text": (lambda v: _is_text(v) or _list_of(_is_text, 1)(v), "a string that is not empty, or a non-empty list of them"),
    **dict.fromkeys(("answer", "answers"), (_is_answer, "a string that is not empty, a number, or a non-empty list of them")),
    **dict.fromkeys(("options", "unlabelled_options", "option_names"), (_list_of(_is_scalar, 1), "a non-empty list of strings")),
    "answer_idx": (lambda v: _is_number(v) and v == int(v), "the number of an option, from 0"),
    "answer_annotations": (
        _list_of(lambda a: isinstance(a, dict) and "label" in a and _is_points(a.get("points"))),
        "a list of {points: [[x, y], ...], label}",
    ),
    "points": (lambda v: _is_points(v) or _list_of(_is_points)(v), "a list of [x, y], with timestamps one of such lists"),
    "image_points": (_list_of(_is_points), "a list of [x, y] for each image"),
    "timestamps": (_list_of(_is_number), "a list of seconds"),
    "tracks": (
        _list_of(lambda t: isinstance(t, dict) and all(xy is None or _is_pair(xy) for xy in t.values())),
        "a list of {object: [x, y]}, one for each of timestamps",
    ),
    "point_scale": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "weight": (_is_weight, _WEIGHT),
    "message_weight": (lambda v: isinstance(v, dict), "an object"),
}


def check_task(record: dict[str, Any], where: str = "") -> None:
    """Checks the values of a task's fields, as far as that takes no image.

    Args:
        record: nulls are fields that are not there.
        where: precedes the field in errors (`message_list[3].`).

    Raises:
        ValueError: names the field and what was found.
    """
    given = {field: value for field, value in record.items() if value is not None}
    for field, (fits, wanted) in _FIELDS.items():
        if field in given and not fits(given[field]):
            raise ValueError(f"{where}{field} must be {wanted}, got {reprlib.repr(given[field])}")
    options = given.get("unlabelled_options", given.get("options"))
    if options is not None and "answer_idx" in given and not 0 <= given["answer_idx"] < len(options):
        raise ValueError(f"{where}answer_idx={given['answer_idx']} is none of the {len(options)} options")
    for field in ("points", "tracks"):
        if field in given and "timestamps" in given and len(given[field]) != len(given["timestamps"]):
            raise ValueError(f"{where}{field} has {len(given[field])} entries, timestamps has {len(given['timestamps'])}")
    if "tracks" in given and "timestamps" not in given:
        raise ValueError(f"{where}tracks need timestamps")
    if "messages" in given:
        try:
            conversation(given["messages"])
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None


def conversation(messages: Sequence[str | dict[str, Any]]) -> list[str]:
    """Texts of messages that alternate user, assistant.

    Args:
        messages: strings, or {"role": "user" | "assistant", "content": str}, with `weight` (a factor of an answer's loss) or without.

    Raises:
        ValueError: no messages, a role out of turn, or content that is not text.
    """
    if not is_list(messages) or len(messages) == 0:
        raise ValueError(f"messages is a list of at least one message, got {messages!r}")
    texts = []
    for i, message in enumerate(messages):
        expected = "assistant" if i % 2 else "user"
        if isinstance(message, dict):
            if message.get("role") != expected:
                raise ValueError(
                    f"messages[{i}] has the role {message.get('role')!r}; roles alternate user, assistant, so it must be {expected!r}"
                )
            weight = message.get("weight")
            if weight is not None and not _is_weight(weight):
                raise ValueError(f"messages[{i}].weight must be {_WEIGHT}, got {reprlib.repr(weight)}")
            message = message.get("content")  # type: ignore[assignment]
        if not isinstance(message, str):
            raise ValueError(f"messages[{i}] is {type(message).__name__}; a message is a string or {{'role', 'content': string}}")
        texts.append(message)
    return texts
