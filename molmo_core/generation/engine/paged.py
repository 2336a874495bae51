"""The key/value cache in pages, and the attention of prompts and of decoding over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from molmo_core.nn.attention import Attention, Mask, attend
from molmo_core.nn.configs import LlmConfig

if TYPE_CHECKING:
    from molmo_core.generation.engine.prompt_kernel import PromptTables


class PagedCache:
    """Keys and values of all layers: for each, [pages + 1, H_kv, page, D]. Page 0 takes what belongs to nobody."""

    def __init__(self, config: LlmConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        shape = (pages + 1, config.kv_heads, page_size, config.head_width)
        self.page_size = page_size
        # Zeros: padding is multiplied by weights of 0, which must not meet NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    @staticmethod
    def page_bytes(config: LlmConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        return 2 * config.n_layers * config.kv_heads * page_size * config.head_width * dtype.itemsize

    @property
    def has_kernels(self) -> bool:
        """Whether kernels read these pages: on a GPU, in half precision (their products are not exact in others)."""
        keys, width, size = self.keys[0], self.keys[0].shape[-1], self.page_size
        powers = all(n >= 16 and n & (n - 1) == 0 for n in (width, size))
        return keys.is_cuda and keys.dtype in (torch.bfloat16, torch.float16) and powers

    def write(self, layer: int, pages: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k, v [B, H_kv, S, D] at (page, offset), int64 [B, S]."""
        self.keys[layer][pages, :, offsets] = k.transpose(1, 2)
        self.values[layer][pages, :, offsets] = v.transpose(1, 2)

    def read(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H_kv, n * page, D] of the pages int64 [B, n]."""
        return tuple(store[layer][tables].transpose(1, 2).flatten(2, 3) for store in (self.keys, self.values))  # type: ignore[return-value]


class Stored(NamedTuple):
    """Where the keys and values of a layer go."""

    keys: torch.Tensor
    """[pages, H_kv, page, D], contiguous; the values likewise."""
    values: torch.Tensor
    pages: torch.Tensor
    """int64 [T]: the page of each token."""
    offsets: torch.Tensor
    """int64 [T]: its place in the page."""


class PromptPart(NamedTuple):
    """The tokens of one prompt among those of a step."""

    rows: slice
    pages: torch.Tensor
    """int64 [n]: the pages of the sequence, these tokens included."""
    end: int
    """Tokens of the sequence, these included."""
    mask: Mask
    """Over all of them, or None = causal."""


@dataclasses.dataclass
class PromptAttention:
    """Attention of the tokens of several prompts, one row [1, T]: each to those of its own sequence, earlier ones included."""

    cache: PagedCache
    pages: torch.Tensor
    """int64 [1, T]: the page of each new token (0: padding)."""
    offsets: torch.Tensor
    """int64 [1, T]: its place in the page."""
    parts: Sequence[PromptPart]
    """Of the prompts, one after the other; empty if there are tables."""
    tables: PromptTables | None = None
    """For the kernel that reads the pages."""
    two_ways: bool = False
    """Some tokens see ahead (tables only)."""

    def of(self, layer: int) -> Attention:
        """The attention of one layer, whose number it knows itself."""
        return lambda _, q, k, v: self(layer, q, k, v)

    def stored(self, layer: int) -> Stored:
        """Where the keys and values of a layer go."""
        return Stored(self.cache.keys[layer], self.cache.values[layer], self.pages[0], self.offsets[0])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, H, D], k, v [T, H_kv, D], which are stored already -> [T, H · D]; by the kernel."""
        from molmo_core.generation.engine.prompt_kernel import prompt_attention  # Triton is there with a GPU only

        assert self.tables is not None
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = prompt_attention(q, k, v, self.cache.keys[layer], self.cache.values[layer], self.tables, self.two_ways)
        return out[0].transpose(0, 1).flatten(1)

    @torch.compiler.disable  # compiled blocks end here and begin again: what is compiled sees one shape only, whoever sees whom
    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, H, T, D], k, v [1, H_kv, T, D] -> [1, H, T, D]."""
        if self.tables is not None:
            from molmo_core.generation.engine.prompt_kernel import prompt_attention, write_pages  # Triton is there with a GPU only

            keys, values = self.cache.keys[layer], self.cache.values[layer]
            write_pages(k, v, keys, values, self.pages, self.offsets)
            return prompt_attention(q, k, v, keys, values, self.tables, self.two_ways)
        self.cache.write(layer, self.pages, self.offsets, k, v)
        out = torch.zeros_like(q)  # padding gets 0
        for rows, pages, end, mask in self.parts:
            if end > rows.stop - rows.start:
                own_k, own_v = (t[:, :, :end] for t in self.cache.read(layer, pages[None]))
            else:
                own_k, own_v = k[:, :, rows], v[:, :, rows]
            out[:, :, rows] = attend(q[:, :, rows], own_k, own_v, mask)
        return out


@dataclasses.dataclass
class DecodeAttention:
    """Attention of one new token a sequence to all of its tokens."""

    cache: PagedCache
    tables: torch.Tensor
    """int32 [B, n]: the pages of each sequence (0 behind its last)."""
    lengths: torch.Tensor
    """int32 [B]: its tokens, the new one included."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [B, H, 1, D], k, v [B, H_kv, 1, D] -> [B, H, 1, D]."""
        size = self.cache.page_size
        last = (self.lengths - 1).long()[:, None]
        pages = self.tables.gather(1, last // size).long()
        self.cache.write(layer, pages, last % size, k, v)
        return attend_pages(q, self.cache.keys[layer], self.cache.values[layer], self.tables, self.lengths)


def attend_pages(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, parts: int | None = None
) -> torch.Tensor:
    """Attention of one token a sequence to all of its tokens.

    Args:
        q: [B, H, 1, D].
        keys, values: [pages, H_kv, page, D] of one layer.
        tables: int32 [B, n], the pages of each sequence.
        lengths: int32 [B], its tokens.
        parts: on a GPU: with the kernel that reads only these pages, by so many programs a sequence; None: plain torch, which copies them.

    Returns:
        [B, H, 1, D].
    """
    if parts is not None and q.is_cuda:
        from molmo_core.generation.engine.decode_kernel import paged_attention  # Triton is there with a GPU only

        return paged_attention(q[:, :, 0].contiguous(), keys, values, tables, lengths, parts)[:, :, None]
    k, v = (store[tables.long()].transpose(1, 2).flatten(2, 3) for store in (keys, values))
    seen = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
    return attend(q, k, v, seen[:, None, None])
