"""Choosing the next tokens of many requests at once, on the device: what is drawn for one does not depend on the others.

What the settings of a batch come to is sent to the device once, when the batch changes; a step sends a number a row at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from molmo_core.generation.engine.edits import Edits, Histories
from molmo_core.generation.engine.noise import keys_of, noisy, token_bits
from molmo_core.generation.engine.requests import TokenLogprobs
from molmo_core.generation.engine.rows import Row
from molmo_core.generation.engine.staging import to_device

HOTTEST = 1e30
"""Temperatures above change nothing any more, and are not float32."""


class Scores(NamedTuple):
    """What a step of the model gives for every row."""

    logits: torch.Tensor
    """float32 [B, E]."""
    best: torch.Tensor
    """int64 [B]: the most probable token of each."""
    finite: torch.Tensor
    """bool [B]: the row has a most probable token; the others have logits that are not numbers."""

    @classmethod
    def of(cls, logits: torch.Tensor) -> Scores:
        """Of float32 [B, E]."""
        best = logits.argmax(-1)
        return cls(logits, best, logits.gather(1, best[:, None])[:, 0].isfinite())  # NaN is larger than any number


class Batch:
    """The settings of the requests that are served together, on the device."""

    def __init__(self, rows: Sequence[Row], device: torch.device):
        self.rows, self.device = list(rows), device
        self.edits = Edits(rows, device) if any(row.params.edits_logits for row in rows) else None
        self.restricted = [i for i, row in enumerate(rows) if row.grammar is not None]
        params = [row.params for row in rows]
        self.needs_host = any(p.needs_host for p in params)
        """Choosing needs tokens on the host, or gives more than a token."""
        self.greedy = all(p.greedy for p in params)
        self.changes = self.edits is not None or bool(self.restricted)
        """The logits are edited before a token is chosen."""
        if self.greedy:
            return
        # Greedy rows go through with 1: what is drawn for them is not used.
        columns = [(1.0 if p.greedy else min(p.temperature, HOTTEST), p.top_p, p.min_p, p.greedy) for p in params]
        self.temperature, self.top_p, min_p, self.greedy_rows = to_device(np.array(columns, np.float32).T.copy(), device)[:, :, None]
        self.min_p = min_p.log() if any(p.min_p for p in params) else None
        self.sorts = any(p.top_k or p.top_p < 1 for p in params)
        self.top_k = to_device(np.array([min(p.top_k or 2**62, 2**62) for p in params]), device)[:, None]
        self.seeds = np.array([row.seed % 2**64 for row in rows], np.uint64)


class Sampler:
    """Chooses tokens, and counts those of the requests that ask for penalties."""

    def __init__(self, slots: int, device: torch.device):
        """`slots`: answers in work at most."""
        self.device = device
        self._histories = Histories(slots, device)
        self._token_bits = torch.empty(0)
        self._noisy: Callable[..., torch.Tensor] = torch.compile(noisy, dynamic=True) if device.type == "cuda" else noisy

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The settings of these rows; good for as many steps as the rows are the same."""
        return Batch(rows, self.device)

    def choose(self, scores: Scores, batch: Batch) -> torch.Tensor:
        """The next token of each row, int64 [B]. The logits are changed in place if a request edits them."""
        logits, best = scores.logits, scores.best
        if batch.restricted:
            _restrict(logits, batch)
        if batch.edits is not None:
            batch.edits.apply(logits, self._histories)
        if batch.changes:
            best = logits.argmax(-1)
        if not batch.greedy:
            keys = to_device(keys_of(batch.seeds, np.array([row.answered + 1 for row in batch.rows], np.uint64)), self.device)
            if len(self._token_bits) != logits.shape[-1]:
                self._token_bits = token_bits(logits.shape[-1], self.device)
            drawn = self._noisy(_filtered(logits, batch), self._token_bits, keys).argmax(-1)
            best = torch.where(batch.greedy_rows[:, 0] > 0, best, drawn)
        if batch.edits is not None:
            batch.edits.count(best, self._histories)
        return best


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, wanted: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """Log-probabilities of the chosen tokens int64 [B], for the rows that want them (and of how many top tokens)."""
    rows = [i for i, count in enumerate(wanted) if count is not None]
    result: list[TokenLogprobs | None] = [None] * len(wanted)
    if not rows:
        return result
    index = to_device(np.array(rows), logits.device)
    values = logits[index].log_softmax(-1)
    own = values.gather(1, tokens[index, None])[:, 0].tolist()
    best = values.topk(max(1, max(count or 0 for count in wanted)), dim=-1)
    for i, value, top_values, top_ids in zip(rows, own, best.values.tolist(), best.indices.tolist()):
        result[i] = TokenLogprobs(value, list(zip(top_ids, top_values))[: wanted[i]])
    return result


def _restrict(logits: torch.Tensor, batch: Batch) -> None:
    """-inf for the tokens that grammars do not allow, in place."""
    size = logits.shape[-1]
    bits = np.zeros((len(batch.restricted), -(-size // 32)), np.int32)
    for i, mask in zip(batch.restricted, bits):
        state: Any = batch.rows[i].grammar
        state.allow(mask)
    tokens = torch.arange(size, device=logits.device)
    words = to_device(bits, logits.device)[:, tokens >> 5]
    index = to_device(np.array(batch.restricted), logits.device)
    logits[index] = logits[index].masked_fill((words >> (tokens & 31).int() & 1) == 0, -torch.inf)


def _filtered(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits divided by the temperatures, -inf for the tokens that are not drawn."""
    scaled = logits / batch.temperature
    if batch.min_p is not None:
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + batch.min_p, -torch.inf)
    if not batch.sorts:
        return scaled
    ordered, indices = scaled.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= batch.top_k, -torch.inf)
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)  # probability of all that are more probable
    before[:, 0] = 0
    beyond = (before >= batch.top_p) & (batch.top_p < 1) & (ranks > 0)  # 1e-300 is 0 in float32
    ordered = ordered.masked_fill(beyond, -torch.inf)
    return torch.empty_like(scaled).scatter_(-1, indices, ordered)
