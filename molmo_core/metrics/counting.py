"""Counting (CountBenchQA, PixMo-Count): the number that a reply states."""

from __future__ import annotations

import re

from molmo_core.metrics.answers import NUMBER_WORDS, clean_prediction
from molmo_core.metrics.registry import register
from molmo_core.metrics.truth import Truth

_TOTAL = re.compile(r"\ba total of (\w{1,32})", re.IGNORECASE)
_WORDS = NUMBER_WORDS | {
    word: value
    for value, word in enumerate(
        ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"), 11
    )
}
_MOST_DIGITS = 18


def parse_count(prediction: str) -> int | None:
    """The number stated: "... a total of N", else the last word, as digits or a word up to twenty; "There are none." is 0.

    Returns:
        the count, or None if the reply states none.
    """
    words = re.findall(r"\w+", prediction.lower())
    total = _TOTAL.search(prediction)
    for word in ([total[1].lower()] if total else []) + words[-1:]:
        if word.isdecimal() and len(word) <= _MOST_DIGITS:
            return int(word)
        if word in _WORDS:
            return _WORDS[word]
    return None


@register("count", main="correct", needs=("count",))
def count(answer: str, truth: Truth, *, close_share: float = 0.0) -> dict[str, float]:
    """`correct`; `close`: within 1, and within `close_share` of the count more (0.05 for videos); `valid`: a number is stated."""
    stated, target = parse_count(clean_prediction(answer)), truth.count
    assert target is not None
    off = None if stated is None else abs(stated - target)
    return {
        "correct": float(off == 0),
        "close": float(off is not None and off <= 1 + int(close_share * target)),
        "valid": float(off is not None),
    }
