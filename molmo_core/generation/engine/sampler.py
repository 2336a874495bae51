"""Choosing the next tokens of many requests at once, on the device: what is drawn for one does not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from molmo_core.generation.engine.grammars import GrammarState
from molmo_core.generation.engine.requests import SamplingParams, TokenLogprobs

MASK_32 = 0xFFFFFFFF


class Row(NamedTuple):
    """What choosing a token needs to know of a request."""

    params: SamplingParams
    tokens: Sequence[int]
    """Tokens of the prompt and of the answer so far."""
    prompt_length: int
    seed: int
    """The request's, or one that was drawn for it."""
    ends: Sequence[int]
    """Tokens that end the answer."""
    grammar: GrammarState | None = None
    """What may come next; None: anything."""


class Choice(NamedTuple):
    """Result of `choose`."""

    tokens: torch.Tensor
    """int64 [B]."""
    finite: torch.Tensor
    """bool [B]: the row has a token to choose; the others have logits that are not numbers."""


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> Choice:
    """The next token of each row.

    Args:
        logits: float32 [B, E]; changed in place if a request edits its logits.
        rows: one a row.
    """
    best = logits.argmax(-1)
    finite = logits.gather(1, best[:, None])[:, 0].isfinite()  # NaN is larger than any number
    edited = [i for i, row in enumerate(rows) if row.params.edits_logits]
    restricted = [i for i, row in enumerate(rows) if row.grammar is not None]
    if restricted:
        _restrict(logits, rows, restricted)
    for i in edited:
        _edit(logits[i], rows[i])
    best = logits.argmax(-1) if edited or restricted else best
    if all(row.params.greedy for row in rows):
        return Choice(best, finite)
    greedy = torch.tensor([row.params.greedy for row in rows], device=logits.device)
    drawn = _draw(_filtered(logits, [row.params for row in rows]), rows)
    return Choice(torch.where(greedy, best, drawn), finite)


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, wanted: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """Log-probabilities of the chosen tokens int64 [B], for the rows that want them (and of how many top tokens)."""
    rows = [i for i, count in enumerate(wanted) if count is not None]
    result: list[TokenLogprobs | None] = [None] * len(wanted)
    if not rows:
        return result
    index = torch.tensor(rows, device=logits.device)
    values = logits[index].log_softmax(-1)
    own = values.gather(1, tokens[index, None])[:, 0].tolist()
    best = values.topk(max(1, max(count or 0 for count in wanted)), dim=-1)
    for i, value, top_values, top_ids in zip(rows, own, best.values.tolist(), best.indices.tolist()):
        result[i] = TokenLogprobs(value, list(zip(top_ids, top_values))[: wanted[i]])
    return result


def _restrict(logits: torch.Tensor, rows: Sequence[Row], restricted: Sequence[int]) -> None:
    """-inf for the tokens that grammars do not allow, in place."""
    size = logits.shape[-1]
    bits = np.zeros((len(restricted), -(-size // 32)), np.int32)
    for i, mask in zip(restricted, bits):
        state = rows[i].grammar
        assert state is not None
        state.allow(mask)
    tokens = torch.arange(size, device=logits.device)
    words = torch.from_numpy(bits).to(logits.device)[:, tokens >> 5]
    index = torch.tensor(restricted, device=logits.device)
    logits[index] = logits[index].masked_fill((words >> (tokens & 31).int() & 1) == 0, -torch.inf)


def _edit(logits: torch.Tensor, row: Row) -> None:
    """Penalties, bias and minimum length, in place, on logits [E]."""
    params, size, answer = row.params, logits.shape[0], row.tokens[row.prompt_length :]
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({token for token in row.tokens if 0 <= token < size}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if answer and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.tensor(answer, device=logits.device).unique(return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biases = [(token, bias) for token, bias in params.logit_bias.items() if 0 <= token < size]
        tokens = torch.tensor([token for token, _ in biases], dtype=torch.int64, device=logits.device)
        logits.index_add_(0, tokens, torch.tensor([bias for _, bias in biases], dtype=logits.dtype, device=logits.device))
    if len(answer) < params.min_tokens:
        ends = torch.tensor(list(row.ends), dtype=torch.int64, device=logits.device)
        longer = logits.index_fill(0, ends, -torch.inf)
        logits.copy_(torch.where(longer.amax() > -torch.inf, longer, logits))  # a grammar may leave nothing but the end


def _filtered(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Logits divided by the temperatures, -inf for the tokens that are not drawn."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    # Greedy rows go through with 1: what is drawn for them is not used.
    scaled = logits / column([1.0 if p.greedy else p.temperature for p in params])
    if any(p.min_p for p in params):
        least = scaled.amax(-1, keepdim=True) + column([p.min_p for p in params]).log()
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if all(p.top_k == 0 and p.top_p == 1 for p in params):
        return scaled
    size = logits.shape[-1]
    ordered, indices = scaled.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(size, device=logits.device)
    ordered = ordered.masked_fill(ranks >= column([p.top_k or size for p in params]), -torch.inf)
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)  # probability of all that are more probable
    before[:, 0] = 0
    top_p = column([p.top_p for p in params])
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1) & (ranks > 0), -torch.inf)  # 1e-300 is 0 in float32
    return torch.empty_like(scaled).scatter_(-1, indices, ordered)


def _draw(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """One token a row from the distribution of the logits: the largest of logits plus Gumbel noise of (seed, position, token)."""
    keys = [_mix((row.seed & MASK_32) ^ _mix((row.seed >> 32 & MASK_32) ^ _mix(len(row.tokens) - row.prompt_length + 1))) for row in rows]
    state = torch.tensor(keys, dtype=torch.int64, device=logits.device)[:, None]
    tokens = torch.arange(logits.shape[-1], dtype=torch.int64, device=logits.device)
    bits = _mix_tensor((tokens * 0x9E3779B9 & MASK_32) ^ state)
    uniform = (bits >> 8).double().add(0.5).mul(2.0**-24)  # in (0, 1)
    noise = -(-uniform.log()).log()
    return (logits.double() + noise).argmax(-1)


def _mix(x: int) -> int:
    """A permutation of 32 bits in which every bit of the input changes half of the output (Wellons' lowbias32)."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK_32
    x ^= x >> 15
    x = x * 0x846CA68B & MASK_32
    return x ^ x >> 16


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`_mix` of int64 values below 2^32: their products stay below 2^63 as long as the factor is split."""
    x = x ^ x >> 16
    x = _times(x, 0x7FEB352D)
    x = x ^ x >> 15
    x = _times(x, 0x846CA68B)
    return x ^ x >> 16


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor modulo 2^32."""
    low, high = factor & 0xFFFF, factor >> 16
    return x * low + ((x * high & 0xFFFF) << 16) & MASK_32
