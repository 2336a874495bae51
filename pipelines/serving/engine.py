"""Generates many answers at once: requests join between two steps, and a row leaves as soon as it has ended.

Requests that arrive together are read (prefilled) as one batch and stay a group with a key/value cache of its own; every
step advances each group by one token. So nobody waits for a longer answer to end, and no cache is ever copied together.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from molmo_core.generation.generate import Decoder, prepare_inputs
from molmo_core.generation.sampling import SamplingConfig, next_token

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Row:
    """One request in the engine."""

    example: dict[str, Any]
    """Model inputs of the prompt, as a preprocessor gives them (numpy)."""
    max_new_tokens: int
    sampling: SamplingConfig
    seed: int | None
    emit: Callable[[int | None, str | None, Exception | None], None]
    """Called with (token, finish reason, error): a token that belongs to the answer or None; the reason with the last call."""
    cancelled: bool = False
    """Set by the caller, from any thread: nobody waits for the answer any more."""
    count: int = 0
    generator: torch.Generator | None = None


@dataclasses.dataclass
class _Group:
    """Rows that were read together."""

    decoder: Decoder
    rows: list[Row]
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
    def admit(self, rows: Sequence[Row]) -> None:
        """Reads the prompts of new rows as one batch. An error goes to the `emit` of the row that caused it."""
        rows = [row for row in rows if not row.cancelled]
        if not rows:
            return
        try:
            batch = prepare_inputs(self._model, self._collate([row.example for row in rows]))
            decoder = Decoder(self._model, max(row.max_new_tokens for row in rows))
            logits = decoder.prefill(batch)
        except Exception as error:  # of whatever a prompt holds or the device raises: goes to its row, the others go on
            if len(rows) == 1:
                rows[0].emit(None, None, error)
            else:  # one by one, so that only the row at fault fails; a batch that was too large for the memory just takes longer
                logger.warning("%d prompts could not be read as one batch (%s: %s)", len(rows), type(error).__name__, error)
                for row in rows:
                    self.admit([row])
            return
        for row in rows:
            if not row.sampling.greedy:
                row.generator = torch.Generator(self._device)
                _ = row.generator.seed() if row.seed is None else row.generator.manual_seed(row.seed)
        self._groups.append(_Group(decoder, rows, logits))

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row; rows that end, or that nobody waits for, leave."""
        for group in self._groups:
            try:
                self._step(group)
            except Exception as error:
                for row in group.rows:
                    row.emit(None, None, error)
                group.rows = []
        self._groups = [group for group in self._groups if group.rows]

    def _step(self, group: _Group) -> None:
        tokens = group.logits.argmax(-1)
        for i, row in enumerate(group.rows):
            if row.generator is not None:
                # Row by row: what is drawn for a request does not depend on its neighbours.
                tokens[i] = next_token(group.logits[i : i + 1], row.sampling, row.generator)[0]
        stays = [self._give(row, token) for row, token in zip(group.rows, tokens.tolist())]
        if not all(stays):
            kept = [i for i, stay in enumerate(stays) if stay]
            group.rows = [group.rows[i] for i in kept]
            if not kept:
                return
            index = torch.tensor(kept, device=tokens.device)
            group.decoder.reorder(index)
            tokens = tokens[index]
        group.logits = group.decoder.step(tokens)

    def _give(self, row: Row, token: int) -> bool:
        """Hands a token out; whether the row goes on."""
        if row.cancelled:
            return False
        row.count += 1
        self.tokens += 1
        if token == self._end:
            row.emit(None, "stop", None)
            return False
        reason = "length" if row.count >= row.max_new_tokens else None
        row.emit(token, reason, None)
        return reason is None
