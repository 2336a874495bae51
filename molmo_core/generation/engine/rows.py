"""What choosing tokens needs to know of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from molmo_core.generation.engine.grammars import GrammarState
from molmo_core.generation.engine.requests import SamplingParams


class Row(NamedTuple):
    """A request among those that tokens are chosen for."""

    params: SamplingParams
    tokens: Sequence[int]
    """Tokens of the prompt and of the answer so far (-1: not known to the host yet); it grows with the answer."""
    prompt_length: int
    seed: int
    """The request's, or one that was drawn for it."""
    ends: Sequence[int]
    """Tokens that end the answer."""
    grammar: GrammarState | None = None
    """What may come next; None: anything."""
    slot: int = 0
    """The place of the answer among those in work, from 0."""
    pages: object = None
    """Its pages: other ones, if another answer has the slot, or this one has it anew."""

    @property
    def answered(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.prompt_length
