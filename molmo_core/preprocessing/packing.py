"""Several examples in one training sequence: which ones go together (from their lengths alone), and joining their arrays.

The packer holds a small buffer of examples. When it is full, the hardest example to place (the one that takes most of either
budget) opens a pack, and the others fill it exactly: a dynamic programme over the token budget finds, for every total, the
choice with the fewest crops, oldest examples first, and stops as soon as the pack is full. Hard examples therefore never pile
up, and the small ones stay in the buffer for as long as they are needed to fill gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")

PACK_STRIDE = 100_000
"""Subsegment ids of the n-th packed example start at n·PACK_STRIDE."""

_SEQUENCES = ("input_ids", "labels", "loss_masks", "position_ids")
_POOLED = ("pooled_patches_idx", "low_res_pooled_idx", "high_res_pooled_idx")
_MEDIA = ("images", "image_masks")


class Waiting(NamedTuple, Generic[Item]):
    """An example in the packer's buffer."""

    item: Item
    tokens: int
    crops: int
    passed: int
    """Packs that were made without it."""


class Packer(Generic[Item]):
    """Groups a stream of examples into packs within two budgets. Deterministic; its whole state is `buffer`.

    Args:
        max_tokens: budget of a pack, tokens (the sequence length).
        max_crops: budget of a pack, crops or frames.
        buffer_size: examples among which to choose.
        max_passed: an example that was passed over so often opens the next pack.
    """

    def __init__(self, max_tokens: int, max_crops: int, buffer_size: int = 48, max_passed: int = 64):
        if max_tokens < 1 or max_crops < 0 or buffer_size < 1:
            raise ValueError(f"max_tokens={max_tokens}, max_crops={max_crops}, buffer_size={buffer_size}: too small")
        self.max_tokens, self.max_crops, self.buffer_size, self.max_passed = max_tokens, max_crops, buffer_size, max_passed
        self.buffer: list[Waiting[Item]] = []
        """The examples that wait, oldest first. Save it, and set it again to resume."""

    def add(self, item: Item, tokens: int, crops: int) -> list[Item] | None:
        """Takes the next example of the stream; returns a pack once the buffer is full.

        Raises:
            ValueError: the example alone exceeds a budget.
        """
        if not 0 < tokens <= self.max_tokens or not 0 <= crops <= self.max_crops:
            raise ValueError(
                f"example {item!r} has {tokens} tokens and {crops} crops or frames; a pack takes 1 to {self.max_tokens} tokens and at "
                f"most {self.max_crops} crops: shorten it (max_crops, max_frames, max_text_tokens) or raise the packing's limits"
            )
        self.buffer.append(Waiting(item, tokens, crops, 0))
        return self._take() if len(self.buffer) >= self.buffer_size else None

    def flush(self) -> list[list[Item]]:
        """Packs what is left at the end of a finite stream."""
        packs = []
        while self.buffer:
            packs.append(self._take())
        return packs

    def _take(self) -> list[Item]:
        """Removes a pack from the buffer; its items are in the order in which they came."""
        first = self._opener()
        opener = self.buffer[first]
        others = [i for i in range(len(self.buffer)) if i != first]
        sizes = [(self.buffer[i].tokens, self.buffer[i].crops) for i in others]
        fill = best_fill(sizes, self.max_tokens - opener.tokens, self.max_crops - opener.crops)
        chosen = {first, *(others[i] for i in fill)}
        pack = [w.item for i, w in enumerate(self.buffer) if i in chosen]
        self.buffer = [w._replace(passed=w.passed + 1) for i, w in enumerate(self.buffer) if i not in chosen]
        return pack

    def _opener(self) -> int:
        """The oldest example if it was passed over too often, else the one that takes most of either budget."""
        if self.buffer[0].passed >= self.max_passed:
            return 0
        crops = max(self.max_crops, 1)
        return max(range(len(self.buffer)), key=lambda i: (max(self.buffer[i].tokens / self.max_tokens, self.buffer[i].crops / crops), -i))


def best_fill(sizes: Sequence[tuple[int, int]], tokens: int, crops: int) -> list[int]:
    """The choice of examples with most tokens within both budgets, and the fewest crops among those.

    Args:
        sizes: tokens and crops of each example, in order of preference: examples that come after the first full choice are not
            looked at.
        tokens, crops: the budgets.

    Returns:
        Indices into `sizes`, ascending.
    """
    # fewest[t]: fewest crops of a choice of exactly t tokens. taken[k]: totals for which the k-th usable example is in that choice.
    unreachable = crops + 1
    fewest = np.full(tokens + 1, unreachable, np.int32)
    fewest[0] = 0
    usable: list[int] = []
    taken: list[np.ndarray] = []
    for i, (t, c) in enumerate(sizes):
        if fewest[tokens] < unreachable:
            break
        if t > tokens or c > crops:
            continue
        candidate = fewest[: tokens + 1 - t] + c
        better = candidate < np.minimum(fewest[t:], unreachable)
        np.copyto(fewest[t:], candidate, where=better)
        usable.append(i)
        taken.append(better)
    total = int(np.flatnonzero(fewest < unreachable)[-1])
    chosen = []
    for i, better in zip(reversed(usable), reversed(taken)):
        t = sizes[i][0]
        if total >= t and better[total - t]:
            chosen.append(i)
            total -= t
    return chosen[::-1]
