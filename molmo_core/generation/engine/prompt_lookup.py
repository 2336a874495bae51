"""Speculation by prompt lookup: what may follow an answer is what followed the last time that its newest tokens stood in prompt or answer.

No model proposes. All that is proposed is computed in one step, as further rows of the batch: each with the pages of its sequence, one more
token of which it sees. What the model would have taken anyway is accepted, so the answer is the same.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from molmo_core.generation.engine.scheduler import Sequence

LENGTHS = (4, 3, 2)
"""Of the groups of tokens that are looked up, in this order: longer ones are right more often."""


class PromptLookup:
    """Of one answer: where groups of its tokens were seen last."""

    def __init__(self) -> None:
        self._seen: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in LENGTHS)
        """One behind the last place of each group; without the newest ones."""
        self._counted = 0

    def propose(self, tokens: Items[int], most: int) -> list[int]:
        """The tokens that may follow, so many or none.

        Args:
            tokens: of prompt and answer, all known; those of the last call with more behind them.
            most: at least 1.
        """
        for end in range(self._counted + 1, len(tokens)):
            for length, seen in zip(LENGTHS, self._seen):
                if end >= length:
                    seen[tuple(tokens[end - length : end])] = end
        self._counted = len(tokens) - 1
        for length, seen in zip(LENGTHS, self._seen):
            place = seen.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if place is not None:
                return [tokens[place + i % (len(tokens) - place)] for i in range(most)]  # behind the newest it begins again
        return []


class Speculation:
    """How much is proposed, and what comes of it."""

    def __init__(self, most: int, rows: int, page_size: int):
        """`most`: tokens for an answer; `rows`: of a batch, proposed tokens included."""
        self.most, self.rows, self.page_size = most, rows, page_size
        self.proposed = self.accepted = 0
        """Tokens so far."""

    def propose(self, sequences: Items[Sequence], lookups: Items[PromptLookup]) -> list[list[int]]:
        """For each of them, tokens that may follow: in rows that nobody else needs, and in the pages that it has."""
        free = self.rows - len(sequences)
        proposed: list[list[int]] = []
        for sequence, lookup in zip(sequences, lookups):
            params = sequence.request.params
            room = min(len(sequence.pages) * self.page_size - sequence.computed, params.max_tokens - sequence.count) - 1
            most = min(self.most, free, room) if params.plain else 0
            proposed.append(lookup.propose(sequence.tokens, most) if most > 0 else [])
            free -= len(proposed[-1])
            self.proposed += len(proposed[-1])
        return proposed
