"""Pages of the key/value cache: which are free, who uses which, which hold a prefix that others may share. Without torch."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


class PagePool:
    """Counts references to pages 1..n; page 0 is nobody's: padding is written there.

    A page that nobody uses any more keeps its contents as long as it is not needed: its key finds it again.
    """

    def __init__(self, pages: int, page_size: int):
        """`pages`: how many, without page 0; `page_size`: tokens of each."""
        self.total, self.page_size = pages, page_size
        self._free = collections.deque(range(1, pages + 1))
        self._references = [0] * (pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: collections.OrderedDict[int, None] = collections.OrderedDict()
        """Pages with a key and no user, least recently used first."""

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        """Pages that somebody refers to."""
        return self.total - self.available

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """So many pages, with one reference each; what they held is forgotten.

        Raises:
            ValueError: fewer are `available`.
        """
        if count > self.available:
            raise ValueError(f"{count} pages wanted, {self.available} available")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._unused.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return pages

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest run of keys from the start. They are not referenced yet: see `share`."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def unused(self, pages: Sequence[int]) -> int:
        """How many of these pages nobody uses: so many fewer are `available` once they are shared."""
        return sum(page in self._unused for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """One more reference to each of pages that `find` gave."""
        for page in pages:
            self._references[page] += 1
            self._unused.pop(page, None)

    def publish(self, page: int, key: bytes) -> None:
        """The page is filled: `find` may give it to others. If another page has the key already, this one stays private."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each. The last pages of a sequence are forgotten before its first ones."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._free.append(page)


def page_keys(
    tokens: np.ndarray, positions: np.ndarray, horizon: np.ndarray | None, media: bytes, first_medium: int, page_size: int
) -> list[bytes]:
    """Keys of the full pages of a prompt: equal keys hold equal keys and values.

    A page's key covers every token that its tokens see, directly or through others, and the media if one of these is a media token.

    Args:
        tokens, positions: int64 [S].
        horizon: int64 [S], the last token that this one or an earlier one sees; None: causal.
        media: digest of all media of the prompt.
        first_medium: index of the first media token (S if there is none).
        page_size: tokens of a page.
    """
    both = np.stack([np.asarray(tokens, np.int64), np.asarray(positions, np.int64)], 1)
    digest, seen, keys = hashlib.blake2b(digest_size=16), 0, []
    for number in range(len(both) // page_size):
        end = (number + 1) * page_size
        visible = end if horizon is None else max(end, int(horizon[end - 1]) + 1)
        digest.update(both[seen:visible].tobytes())
        seen = visible
        key = digest.copy()
        key.update(number.to_bytes(8, "little") + (media if first_medium < visible else b""))
        keys.append(key.digest())
    return keys
