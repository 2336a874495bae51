"""Memory for the large arrays of blocks that is used again: fresh pages cost as much as the copy that is made into them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_SMALL_BYTES = 1 << 20
_ALIGNED = 64


class Arena:
    """Two pieces of memory that take turns: the arrays of a block stay until the block after the next one is begun."""

    def __init__(self) -> None:
        self._memory = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._used = self._wanted = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """As `numpy.empty`."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < _SMALL_BYTES:
            return np.empty(shape, dtype)
        start = self._used
        self._wanted = max(self._wanted, start + size)
        if start + size > len(self._memory[0]):
            return np.empty(shape, dtype)  # the next block has more
        self._used = -(-(start + size) // _ALIGNED) * _ALIGNED
        return self._memory[0][start : start + size].view(dtype).reshape(shape)

    def next_block(self) -> None:
        """Begins a block."""
        self._memory.reverse()
        self._used = 0
        if self._wanted > len(self._memory[0]):
            self._memory[0] = np.empty(self._wanted, np.uint8)
