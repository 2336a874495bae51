"""Checksums of a file's blocks: a shard is checked where it is read, a few megabytes at a time, and not before it is needed."""

from __future__ import annotations

import zlib
from pathlib import Path

BLOCK = 4 << 20
"""Bytes that one checksum covers."""


def checksums(path: Path) -> list[int]:
    """CRC-32 of each block of a file."""
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]


class BlockCheck:
    """Checks the blocks of a file in memory, each once.

    Args:
        data: the whole file.
        expected: its `checksums` when it was written.
    """

    def __init__(self, data: memoryview, expected: list[int]):
        self._data, self._expected = data, expected
        self._checked: set[int] = set()

    def damaged(self, start: int, stop: int) -> int | None:
        """The first block of the bytes from `start` to `stop` that is not what was written, None if all are."""
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if block not in self._checked:
                if zlib.crc32(self._data[block * BLOCK : (block + 1) * BLOCK]) != self._expected[block]:
                    return block
                self._checked.add(block)
        return None
