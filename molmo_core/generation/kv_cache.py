"""Keys and values of the tokens seen so far, so that a decoding step computes one position only."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of every layer in buffers that hold a whole generation, so that a step copies one position, not all.

    Attention calls `update` once a layer; the keys are stored after the rotary embedding. Padded positions stay in
    the cache: the attention mask keeps them out.
    """

    def __init__(self, max_length: int) -> None:
        """`max_length`: positions to reserve (prompt and new tokens); buffers grow by half when that is exceeded."""
        self._max_length = max_length
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._lengths: dict[int, int] = {}

    @property
    def length(self) -> int:
        """Positions stored by every layer (padding included)."""
        return min(self._lengths.values(), default=0)

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the new positions of a layer and returns all of them.

        Args:
            layer: index of the block.
            keys, values: [B, n_kv_heads, new, head_dim].

        Returns:
            keys and values [B, n_kv_heads, length, head_dim]; views, valid until the next `update` or `reorder`.
        """
        start = self._lengths.get(layer, 0)
        end = start + keys.shape[2]
        buffers = []
        for store, new in ((self._keys, keys), (self._values, values)):
            if layer not in store or end > store[layer].shape[2]:
                store[layer] = self._grown(store.get(layer), new, start, end)
            store[layer][:, :, start:end] = new
            buffers.append(store[layer][:, :, :end])
        self._lengths[layer] = end
        return buffers[0], buffers[1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Makes row i continue what row `rows[i]` holds (beam search); `rows` [B'] may repeat, drop or add rows."""
        for store in (self._keys, self._values):
            for layer, buffer in store.items():
                store[layer] = buffer.index_select(0, rows)

    def _grown(self, old: torch.Tensor | None, new: torch.Tensor, used: int, needed: int) -> torch.Tensor:
        capacity = max(self._max_length, needed if old is None else needed + needed // 2)
        buffer = new.new_zeros(new.shape[0], new.shape[1], capacity, new.shape[3])
        if old is not None:
            buffer[:, :, :used] = old[:, :, :used]
        return buffer
