"""Where answers go wrong in questions with few possible answers: how often each was given for each."""

from __future__ import annotations

import collections
from typing import Any

from molmo_core.metrics.answers import clean_prediction, normalise_answer
from molmo_core.metrics.counting import parse_count

MOST_TRUTHS, MOST_PAIRS, LEAST_QUESTIONS = 12, 2000, 10
OTHER = "other"
NO_ANSWERS = ("pointing", "multiple_choice")
"""Metrics of answers that are no text out of a set, or one that means another text."""


class Confusion:
    """Counts pairs of a true and a given answer, by type of question, as long as the true ones are few.

    A question counts if its reference answers are all the same.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, collections.Counter[tuple[str, str]]] = {}
        self._open: set[str] = set()
        """Types with too many answers."""

    def add(self, kind: str, metric: str, answers: list[str], prediction: str) -> None:
        """Takes a question and its answer."""
        truths = {normalise_answer(answer) for answer in answers}
        if kind in self._open or metric in NO_ANSWERS or len(truths) != 1:
            return
        pairs = self._pairs.setdefault(kind, collections.Counter())
        count = parse_count(prediction) if metric == "count" else None
        pairs[truths.pop(), normalise_answer(clean_prediction(prediction)) if count is None else str(count)] += 1
        if len(pairs) > MOST_PAIRS or len({truth for truth, _ in pairs}) > MOST_TRUTHS:
            self._open.add(kind)
            del self._pairs[kind]

    def tables(self) -> dict[str, dict[str, Any]]:
        """By type: `answers` (the true ones; numbers in their order, others the most frequent first), and `counts`, a row for each
        true answer: how often each of them was given for it, and last how often something else."""
        tables = {}
        for kind, pairs in sorted(self._pairs.items()):
            truths = collections.Counter[str]()
            for (truth, _), count in pairs.items():
                truths[truth] += count
            if len(truths) < 2 or truths.total() < LEAST_QUESTIONS:
                continue
            numbers = all(truth.isdecimal() for truth in truths)
            answers = sorted(truths, key=int) if numbers else sorted(truths, key=lambda truth: (-truths[truth], truth))
            counts = []
            for truth in answers:
                given = [pairs[truth, answer] for answer in answers]
                counts.append([*given, truths[truth] - sum(given)])
            tables[kind] = {"answers": answers, "counts": counts}
        return tables
