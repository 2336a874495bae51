"""Generates many answers at once: requests join between two steps, and a row leaves as soon as it has ended.

Requests that arrive together are read (prefilled) as one batch and stay a group with a key/value cache of its own; every
step advances each group by one token. So nobody waits for a longer answer to end, and no cache is ever copied together.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch

from molmo_core.generation.events import End, Failed, Ticket, Token
from molmo_core.generation.generate import Decoder, prepare_inputs
from molmo_core.generation.sampling import SamplingConfig, next_token, seeded

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the model."""

    example: dict[str, Any]
    """Model inputs of the prompt, as a preprocessor gives them (numpy)."""
    max_new_tokens: int
    sampling: SamplingConfig
    seed: int | None


@dataclasses.dataclass(eq=False)
class _Row:
    """How far the answer to a request is."""

    ticket: Ticket
    request: Request
    generator: torch.Generator | None
    """Of a request that samples."""
    count: int = 0
    """Tokens drawn."""


@dataclasses.dataclass
class _Group:
    """Rows that were read together."""

    decoder: Decoder
    rows: list[_Row]
    logits: torch.Tensor
    """[B, E] of each row's next token."""


class Engine:
    """A model and the answers in work. Not thread-safe: one thread calls `admit` and `step`."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self._device = next(model.parameters()).device
        self._collate = model.config.build_collator(None, None, include_metadata=False)
        self._end = model.tokenizer.eos_token_id
        self._groups: list[_Group] = []
        self.tokens = 0
        """Tokens generated so far."""

    @property
    def active(self) -> int:
        """Rows in work."""
        return sum(len(group.rows) for group in self._groups)

    @torch.inference_mode()
    def admit(self, tickets: Sequence[Ticket]) -> None:
        """Reads the prompts of new requests (`Request`) as one batch. An error goes to the one that caused it."""
        tickets = [ticket for ticket in tickets if not ticket.cancelled]
        if not tickets:
            return
        try:
            rows = [self._row(ticket) for ticket in tickets]
            batch = prepare_inputs(self._model, self._collate([row.request.example for row in rows]))
            decoder = Decoder(self._model, max(row.request.max_new_tokens for row in rows))
            logits = decoder.prefill(batch)
        except Exception as error:  # of whatever a prompt holds or the device raises: goes to its row, the others continue
            if len(tickets) == 1:
                tickets[0].emit(Failed(error))
            else:  # one by one, so that only the row at fault fails; a batch that was too large for the memory just takes longer
                logger.warning("%d prompts could not be read as one batch (%s: %s)", len(tickets), type(error).__name__, error)
                for ticket in tickets:
                    self.admit([ticket])
            return
        self._groups.append(_Group(decoder, rows, logits))

    def _row(self, ticket: Ticket) -> _Row:
        request: Request = ticket.request
        return _Row(ticket, request, None if request.sampling.greedy else seeded(self._device, request.seed))

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row; rows that end, or that nobody waits for, leave."""
        for group in self._groups:
            try:
                self._step(group)
            except Exception as error:
                logger.exception("A step of %d answers failed", len(group.rows))
                for row in group.rows:
                    row.ticket.emit(Failed(error))
                group.rows = []
        self._groups = [group for group in self._groups if group.rows]

    def _step(self, group: _Group) -> None:
        greedy = group.logits.argmax(-1).tolist()
        # Row by row: what is drawn for a request does not depend on its neighbours.
        drawn = [self._draw(row, group.logits[i : i + 1], greedy[i]) for i, row in enumerate(group.rows)]
        kept = [i for i, (row, token) in enumerate(zip(group.rows, drawn)) if token is not None and self._give(row, token)]
        if len(kept) < len(group.rows):
            group.rows = [group.rows[i] for i in kept]
            if not kept:
                return
            group.decoder.reorder(torch.tensor(kept, device=self._device))
        group.logits = group.decoder.step(torch.tensor([drawn[i] for i in kept], device=self._device))

    def _draw(self, row: _Row, logits: torch.Tensor, greedy: int) -> int | None:
        """The next token of a row; None if there is none, which ends this row alone."""
        if row.generator is None:
            return greedy
        try:
            return int(next_token(logits, row.request.sampling, row.generator))
        except Exception as error:  # of whatever its settings make of its logits
            row.ticket.emit(Failed(error))
            return None

    def _give(self, row: _Row, token: int) -> bool:
        """Hands a token out; whether the row continues."""
        if row.ticket.cancelled:
            return False
        row.count += 1
        self.tokens += 1
        if token == self._end:
            row.ticket.emit(End("stop"))
            return False
        row.ticket.emit(Token(token))
        if row.count < row.request.max_new_tokens:
            return True
        row.ticket.emit(End("length"))
        return False
