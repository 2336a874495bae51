"""Who may see whom, and attention itself.

There is one rule, `SequenceLayout.rule`, a function of token-level arrays. The dense mask, the FlexAttention block mask
and the mask of cached decoding are all derived from it. The blocks know none of this: they are handed an `Attention`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from molmo_core.nn.kv_cache import KVCache
from molmo_core.tokens import PACK_STRIDE

AttentionImplementation = Literal["auto", "sdpa", "flex"]
Mask = torch.Tensor | BlockMask | None
"""bool [B, 1, Q, K] (True = may attend), float [B, 1, Q, K] (added to the scores), a block mask, or None = causal."""
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of (batch row, query, key): whether the query may attend to the key."""


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """What the attention rule knows of a batch of sequences. All arrays are [B, K]; None means the plain case.

    Token q may attend to token k if it does not come later, or both stand in the same image group, or q is an image token and k
    part of the question; and k is not in a narrower segment than q's (`segments[q] <= segments[k]`: annotations of a
    message tree see the shared prefix and themselves, packed examples only themselves); and neither is padding. Every token sees
    itself, so that padded rows stay finite.
    """

    valid: torch.Tensor | None = None
    """bool: real tokens; None = all."""
    segments: torch.Tensor | None = None
    """int64 `subsegment_ids`: 10000 = shared prefix, k = annotation, + 100000·n for the n-th packed example."""
    groups: torch.Tensor | None = None
    """int64: tokens of the same group >= 0 see each other both ways; -1 = causal only. A group never spans packed examples."""
    questions: torch.Tensor | None = None
    """bool: tokens that image tokens (group >= 0) of the same packed example may see ahead."""

    @property
    def is_causal(self) -> bool:
        """No array changes the causal rule."""
        return self.valid is None and self.segments is None and self.groups is None

    def after(self, past: int) -> SequenceLayout:
        """The layout of these tokens behind `past` cached ones, to which they are related causally only."""
        if not past:
            return self
        if self.segments is not None:
            raise ValueError("subsegment_ids (message trees, packed examples) cannot be continued from a cache")
        pad = functools.partial(F.pad, pad=(past, 0))
        return SequenceLayout(
            valid=None if self.valid is None else pad(self.valid, value=True),
            groups=None if self.groups is None else pad(self.groups, value=-1),
            questions=None if self.questions is None else pad(self.questions, value=False),
        )

    def rule(self, queries: torch.Tensor | None = None, keys: torch.Tensor | None = None) -> Rule:
        """The attention rule as a function of (batch row, query, key): broadcastable integer tensors; gives bool.

        Kernels evaluate it for every pair of a block that is not all seen, so it only compares int32 arrays, which are made here: on an
        H100 FlexAttention's backward pass takes 0.6 times as long as with the rule spelt out in int64 (docs/experiments.md).

        Args:
            queries, keys: int64 [Q], [K], the positions that the function's indices stand for; None = position i is index i.
        """

        def of(values: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
            return (values if positions is None else values[..., positions]).int()

        seen, ahead = self._seen(), self._ahead()
        compared = [(of(own, queries), of(other, keys)) for own, other in ahead]
        limits = None if seen is None else (of(seen[0], queries), of(seen[1], keys))
        q_position = None if queries is None else queries.int()
        k_position = None if keys is None else keys.int()

        def may_attend(b: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            at, other = q if q_position is None else q_position[q], k if k_position is None else k_position[k]
            allowed = other <= at
            for of_query, of_key in compared:
                allowed = allowed | (of_query[b, q] == of_key[b, k])
            if limits is not None:
                allowed = allowed & (limits[0][b, q] <= limits[1][b, k])
            return allowed | (at == other)

        return may_attend

    def _seen(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of a token as a query and as a key, [B, K]: the first must not be above the second. None: no limits."""
        if self.valid is None:
            return None if self.segments is None else (self.segments, self.segments)
        segments = torch.zeros_like(self.valid, dtype=torch.int64) if self.segments is None else self.segments
        bounds = torch.iinfo(torch.int32)
        return torch.where(self.valid, segments, bounds.max), torch.where(self.valid, segments, bounds.min)

    def _ahead(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of a token as a query and as a key, [B, K]: where they are equal the query sees the key though it comes later."""
        if self.groups is None:
            return []
        grouped = self.groups >= 0  # where not, numbers that no token has on the other side
        pairs = [(torch.where(grouped, self.groups, -2), self.groups)]
        if self.questions is not None:
            examples = torch.zeros_like(self.groups) if self.segments is None else self.segments // PACK_STRIDE
            pairs.append((torch.where(grouped, examples, -3), torch.where(self.questions, examples, -2)))
        return pairs

    def dense_mask(self, batch: int, keys: int, queries: int | None = None, device: torch.device | None = None) -> torch.Tensor:
        """bool [B, 1, Q, K] for the last `queries` of `keys` positions (all by default)."""
        first = keys - (keys if queries is None else queries)
        b = torch.arange(batch, device=device)[:, None, None]
        q = torch.arange(first, keys, device=device)[None, :, None]
        k = torch.arange(keys, device=device)[None, None, :]
        return self.rule()(b, q, k).expand(batch, -1, -1)[:, None]

    def block_mask(self, batch: int, length: int, device: torch.device) -> BlockMask:
        """The same rule for FlexAttention over whole sequences of `length` tokens."""
        return block_mask(self.rule(), batch, length, length, device)

    def mask(self, batch: int, keys: int, queries: int, device: torch.device, implementation: Literal["sdpa", "flex"]) -> Mask:
        """The mask in the form that `attend` takes.

        Args:
            batch, keys, queries: sizes; the queries are the last of the keys.
            implementation: `flex` makes a block mask when queries and keys are the same tokens.
        """
        if implementation == "flex" and queries == keys and not self.is_causal:
            return self.block_mask(batch, keys, device)
        if self.is_causal and queries in (1, keys):
            return None
        return self.dense_mask(batch, keys, queries, device)


def block_mask(rule: Rule, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """A rule for FlexAttention, of any numbers of queries and keys."""

    def mask_mod(b: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return rule(b, q, k)

    compiled = device.type == "cuda"  # without compilation the whole [B, Q, K] mask is made first
    return create_block_mask(mask_mod, batch, None, queries, keys, device=str(device), _compile=compiled)


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


def _flex_attention(device: torch.device) -> Any:
    """FlexAttention, compiled unless the caller is being compiled (then it becomes part of that)."""
    return flex_attention if device.type == "cpu" or torch.compiler.is_compiling() else _compiled_flex_attention()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, dropout: float = 0.0) -> torch.Tensor:
    """Scaled dot-product attention with grouped keys and values.

    Args:
        q: [B, H, Q, head_dim].
        k, v: [B, H_kv, K, head_dim], H a multiple of H_kv.
        mask: see `Mask`; None is causal when Q == K and everything when Q == 1.
        dropout: probability of dropping an attention weight.

    Returns:
        [B, H, Q, head_dim].
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    share = q.shape[1] // k.shape[1]
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if isinstance(mask, BlockMask):
        return _flex_attention(q.device)(q, k, v, block_mask=mask, enable_gqa=share > 1)
    if share > 1 and q.shape[2] == 1:
        # One query a head: the heads that share keys become queries of one head, so the cache is not copied.
        folded = q.unflatten(1, (k.shape[1], share)).squeeze(3)
        return F.scaled_dot_product_attention(folded, k, v, mask, dropout).flatten(1, 2).unsqueeze(2)
    if share > 1:
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and q.shape[2] > 1)


def attention_weights(q: torch.Tensor, k: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The weights that `attend` uses, float32 [B, H, Q, K], for inspection (not with a block mask)."""
    if isinstance(mask, BlockMask):
        raise ValueError("attention weights are not available from FlexAttention; use attention_implementation='sdpa'")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


class Attention(Protocol):
    """What the blocks of a forward pass are handed: attention of the tokens of this call, in whatever way.

    It knows the mask and where the keys and values of earlier tokens are (in a cache, in pages, on other devices); a block knows only
    its own projections. Called once by every block, layer after layer.
    """

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of one layer.

        Args:
            layer: index of the block.
            q: [B, H, S, head_dim], rotated.
            k, v: [B, H_kv, S, head_dim] of the same tokens, k rotated; H is a multiple of H_kv.

        Returns:
            [B, H, S, head_dim].
        """


@dataclasses.dataclass
class Whole:
    """Attention among the tokens of this call."""

    mask: Mask = None
    dropout: float = 0.0
    """Probability of dropping an attention weight."""
    weights: dict[int, torch.Tensor] | None = None
    """A dictionary, if wanted, that receives the weights float32 [B, H, S, K] by layer (slow)."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.weights is not None:
            self.weights[layer] = attention_weights(q, k, self.mask)
        return attend(q, k, v, self.mask, self.dropout)


@dataclasses.dataclass
class Cached:
    """Attention to the tokens of a cache and of this call, whose keys and values the cache keeps; the mask covers both."""

    cache: KVCache
    whole: Attention
    """Attention to the keys and values that the cache gives: as many of them as its mask has columns."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.whole(layer, q, *self.cache.update(layer, k, v))
