"""Counting (CountBenchQA, PixMo-Count): the number that a reply states."""

from __future__ import annotations

import re

from molmo_core.metrics.answers import NUMBER_WORDS

_TOTAL = re.compile(r"\ba total of (\w+)", re.IGNORECASE)


def parse_count(prediction: str) -> int | None:
    """The number stated: "... a total of N", else the last word, as digits or a word up to ten; "There are none." is 0.

    Returns:
        the count, or None if the reply states none.
    """
    words = re.findall(r"\w+", prediction.lower())
    total = _TOTAL.search(prediction)
    for word in ([total.group(1).lower()] if total else []) + words[-1:]:
        if word.isdecimal():
            return int(word)
        if word in NUMBER_WORDS:
            return NUMBER_WORDS[word]
    return None


def count_score(prediction: str, target: int, tolerance: int = 0) -> float:
    """1 if the stated number is within `tolerance` of the target (published Molmo: 0 for "correct", 1 for "close")."""
    count = parse_count(prediction)
    return float(count is not None and abs(count - target) <= tolerance)
