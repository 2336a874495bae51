"""Media that were prepared lately, by content: a picture in the third turn of a conversation is not decoded a third time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from pipelines.serving.media.features import Features


class MediaCache:
    """Features by key, at most so many bytes of them; the least recently used go first. Used by one thread.

    Args:
        max_bytes: 0 = nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, Features] = OrderedDict()
        self.bytes = 0
        """Held now."""
        self.hits = self.misses = 0

    def get(self, key: Hashable) -> Features | None:
        """The features, if they are here. They are shared: nobody writes to them."""
        features = self._entries.get(key)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return features

    def put(self, key: Hashable, features: Features) -> None:
        """Keeps features, unless they alone are too many bytes."""
        size = _size(features)
        if size > self._max_bytes or key in self._entries:
            return
        self._entries[key] = features
        self.bytes += size
        while self.bytes > self._max_bytes:
            self.bytes -= _size(self._entries.popitem(last=False)[1])


def _size(features: Features) -> int:
    """Bytes of the arrays."""
    return sum(value.nbytes for value in vars(features).values() if hasattr(value, "nbytes"))
