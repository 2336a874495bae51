"""Embeddings of media by what is in them, so that the same picture is not looked at twice."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import blake3
import numpy as np
import torch


def media_digest(example: Mapping[str, Any]) -> bytes:
    """Of everything in a prompt's inputs but its text: pixels, masks, indices. Equal digests have equal features."""
    digest = blake3.blake3()  # 0.6 ms for 3 MB; SHA-256 takes 8 ms, which every answer in work would wait for
    for name in sorted(example):
        value = example[name]
        if name in ("input_ids", "position_ids") or value is None:
            continue
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


class FeatureCache:
    """Tensors by digest, at most so many bytes of them; the least recently used are forgotten."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._entries: collections.OrderedDict[bytes, list[tuple[torch.Tensor, torch.Tensor]]] = collections.OrderedDict()

    def get(self, digest: bytes) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """What `put` was given."""
        entry = self._entries.get(digest)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(digest)
        return entry

    def put(self, digest: bytes, entry: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keeps features and which of them are present; what alone is larger than the bound is not kept."""
        if digest in self._entries or _bytes(entry) > self.max_bytes:
            return
        self._entries[digest] = entry
        self.bytes += _bytes(entry)
        while self.bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= _bytes(oldest)


def _bytes(entry: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(t.nbytes for pair in entry for t in pair)
