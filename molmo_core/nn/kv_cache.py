"""Keys and values of the tokens seen so far, so that a decoding step computes one position only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [B, H_kv, K, head_dim]."""


class RowState(Protocol):
    """What a model keeps of the rows of a cache besides keys and values."""

    def begin(self) -> None:
        """More of the prompts comes: nothing was generated yet."""

    def reorder(self, rows: torch.Tensor) -> None:
        """Makes row i continue what row `rows[i]` was."""

    def internal(self) -> dict[str, torch.Tensor]:
        """What it has found out about the generated tokens, for the output."""


class KVCache:
    """Keys and values of every layer in buffers that hold a whole generation, so that a step copies one position, not all.

    Attention calls `update` once a layer, layer after layer; the keys are stored after the rotary embedding. Padded positions stay
    in the cache: the attention mask keeps them out. Iterating gives the pair (keys, values) of each layer.
    """

    def __init__(self, max_length: int = 0) -> None:
        """`max_length`: positions to reserve (prompt and new tokens); buffers grow by half when that is exceeded."""
        self._max_length = max_length
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._lengths: list[int] = []
        self.state: Any = None
        """What a model keeps of the rows besides, a `RowState`."""

    @classmethod
    def of(cls, past: KVCache | Sequence[KeysAndValues] | None, max_length: int = 0) -> KVCache:
        """The cache that continues `past`: a cache itself, a copy of pairs (one a layer), or a new one."""
        if isinstance(past, KVCache):
            return past
        cache = cls(max_length)
        for layer, (keys, values) in enumerate(past or ()):
            cache.update(layer, keys, values)
        return cache

    @property
    def length(self) -> int:
        """Positions stored by every layer (padding included)."""
        return min(self._lengths, default=0)

    def __len__(self) -> int:
        """Layers that hold something."""
        return len(self._lengths)

    def __getitem__(self, layer: int) -> KeysAndValues:
        """Keys and values of a layer; views, valid until the next change of the cache."""
        end = self._lengths[layer]
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def __iter__(self) -> Iterator[KeysAndValues]:
        return (self[layer] for layer in range(len(self)))

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """Appends the new positions of a layer and returns all of them.

        Args:
            layer: index of the block; one that holds nothing yet must be the next one.
            keys, values: [B, H_kv, new, head_dim].

        Returns:
            keys and values [B, H_kv, K, head_dim]; views, valid until the next change of the cache.
        """
        if layer == len(self._lengths):
            for store, new in ((self._keys, keys), (self._values, values)):
                store.append(new.new_empty(*new.shape[:2], 0, new.shape[3]))
            self._lengths.append(0)
        start = self._lengths[layer]
        end = start + keys.shape[2]
        for store, new in ((self._keys, keys), (self._values, values)):
            if end > store[layer].shape[2]:
                store[layer] = self._grown(store[layer], start, end)
            store[layer][:, :, start:end] = new
        self._lengths[layer] = end
        return self[layer]

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` positions."""
        self._lengths = [min(length, used) for used in self._lengths]

    def reorder(self, rows: torch.Tensor) -> None:
        """Makes row i continue what row `rows[i]` holds (beam search); `rows` [B'] may repeat, drop or add rows."""
        for store in (self._keys, self._values):
            store[:] = [buffer.index_select(0, rows) for buffer in store]
        if self.state is not None:
            self.state.reorder(rows)

    def _grown(self, old: torch.Tensor, used: int, needed: int) -> torch.Tensor:
        capacity = max(self._max_length, needed + needed // 2 if used else needed)
        buffer = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
        buffer[:, :, :used] = old[:, :, :used]
        return buffer
