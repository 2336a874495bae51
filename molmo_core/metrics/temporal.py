"""Moments of a video, and times on a clock, as they are written in answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from molmo_core.metrics.answers import clean_prediction
from molmo_core.metrics.registry import register
from molmo_core.metrics.truth import Truth

Span = tuple[float, float]

_TIME = r"(?:(?:\d{1,3}:)?\d{1,4}:\d{2}(?:\.\d{1,9})?|\d{1,9}(?:\.\d{1,9})?)"
_SPAN = re.compile(
    rf"(?<![\w.:])({_TIME})\s{{0,3}}(?:s|sec|seconds?)?\s{{0,3}}(?:-|–|—|,|to|and|until|till)\s{{0,3}}({_TIME})(?![\d:])", re.IGNORECASE
)
_IOU_AT = (0.3, 0.5, 0.7)
_CLOCK = re.compile(r"(?<![\d:.])(\d{1,2})[:h.](\d{2})(?:[:.](\d{2}))?(?![\d:])(?:\s{0,3}([ap])\.?m\b)?", re.IGNORECASE)
_HALF_DAY = 12 * 3600


def written_spans(answer: str) -> list[Span]:
    """The spans of time of a text in seconds: "2.5 - 7", "from 2 seconds to 7", "0:02 to 1:07", "[2, 7]"; one that ends before it
    begins is left out."""
    spans = [(_seconds(start), _seconds(end)) for start, end in _SPAN.findall(answer)]
    return [(start, end) for start, end in spans if start <= end]


def _seconds(text: str) -> float:
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def iou(found: Sequence[Span], truth: Sequence[Span]) -> float:
    """The share of the time in either that is in both; spans of one list may overlap. Two empty moments are equal if they coincide."""
    a, b = _merged(found), _merged(truth)
    common = sum(max(0.0, min(end, other_end) - max(start, other)) for start, end in a for other, other_end in b)
    either = _length(a) + _length(b) - common
    return common / either if either else float(a == b)


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


@register("temporal_iou", main="iou", needs=("spans",))
def temporal_iou(answer: str, truth: Truth) -> dict[str, float]:
    """Temporal grounding (QVHighlights, Charades-STA): the IoU of the moments, and whether it is at least 0.3, 0.5, 0.7."""
    assert truth.spans is not None
    found = written_spans(clean_prediction(answer))
    overlap = iou(found, truth.spans)
    return {"iou": overlap, **{f"iou_at_{at}": float(overlap >= at) for at in _IOU_AT}, "valid": float(bool(found))}


def written_time(answer: str) -> tuple[int, int, int | None] | None:
    """The first time of day of a text: (hour 0-11, minute, second or None). "3:45", "15:45:10", "10.09 pm", "3h45"."""
    for hour, minute, second, _ in _CLOCK.findall(answer):
        if int(hour) < 24 and int(minute) < 60 and int(second or 0) < 60:
            return int(hour) % 12, int(minute), int(second) if second else None
    return None


@register("clock", main="exact", needs=("answers",))
def clock(answer: str, truth: Truth, *, tolerance: int = 3) -> dict[str, float]:
    """Reading a clock's twelve-hour face. The reference is the first answer.

    `exact`: hour and minute, and the second where the reference has one; `close`: within `tolerance` minutes around the face (ClockBench:
    1); `hour`, `minute`, `second`: each hand by itself; `valid`: there is a time.
    """
    right, found = written_time(truth.answers[0]), written_time(clean_prediction(answer))
    hands = ("hour", "minute") if right is None or right[2] is None else ("hour", "minute", "second")
    if right is None or found is None:
        return dict.fromkeys(("exact", "close", *hands, "valid"), 0.0) | {"valid": float(found is not None)}
    equal = {hand: float(found[i] == right[i]) for i, hand in enumerate(hands)}
    off = abs(_on_face(found) - _on_face(right))
    close = min(off, _HALF_DAY - off) <= 60 * tolerance
    return {"exact": min(equal.values()), "close": float(close), **equal, "valid": 1.0}


def _on_face(time: tuple[int, int, int | None]) -> int:
    hour, minute, second = time
    return 3600 * hour + 60 * minute + (second or 0)
