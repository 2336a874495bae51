"""Several examples in one training sequence: which ones go together (from their lengths alone), and joining their arrays.

The packer holds a small buffer of examples. When it is full, it takes the choice that fills the scarcer budget best: a dynamic
programme over every total of tokens (or of crops, if the waiting examples need clearly more of those) finds for each total the
choice that spends least of the other budget. Totals are exact, not rounded to a grid. Older examples are preferred, the search
stops at the first full pack, an example that was passed over for some time is taken even if the pack is slightly less full, and
after a longer time in any case: nothing starves, so what is trained on keeps the proportions of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from molmo_core.tokens import NO_MORE_POINTS, PACK_STRIDE

Item = TypeVar("Item")

SCARCE = 1.25
"""Crops decide what goes together when the waiting examples need this many times more of their budget than of the tokens'."""

PATIENCE = 32
WORTH = 0.01
"""After PATIENCE packs without it, the oldest example is preferred to a pack that is fuller by no more than WORTH."""

_SEQUENCES = ("input_ids", "labels", "loss_masks", "position_ids")
_MEDIA = ("images", "image_masks")
_POOLED = ("pooled_patches_idx", "low_res_pooled_idx", "high_res_pooled_idx")


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
        max_passed: an example that was passed over so often is in the next pack.
    """

    def __init__(self, max_tokens: int, max_crops: int, buffer_size: int = 48, max_passed: int = 192):
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
        passed, by_crops = self.buffer[0].passed, self._crops_are_scarce()
        chosen = self._choose([0] if passed >= self.max_passed else [], by_crops)
        if passed >= PATIENCE and 0 not in chosen:
            with_oldest = self._choose([0], by_crops)
            if self._used(with_oldest, by_crops) >= self._used(chosen, by_crops) - WORTH:
                chosen = with_oldest
        pack = [self.buffer[i].item for i in sorted(chosen)]
        self.buffer = [w._replace(passed=w.passed + 1) for i, w in enumerate(self.buffer) if i not in chosen]
        return pack

    def _choose(self, chosen: list[int], by_crops: bool) -> list[int]:
        """Completes a choice of places in the buffer."""
        if by_crops:
            self._fill(chosen, by_crops=True)
        self._fill(chosen, by_crops=False)  # after crops: what room is left for tokens
        return chosen

    def _used(self, chosen: list[int], by_crops: bool) -> float:
        """Share of the scarcer budget that a choice uses."""
        if by_crops:
            return sum(self.buffer[i].crops for i in chosen) / self.max_crops
        return sum(self.buffer[i].tokens for i in chosen) / self.max_tokens

    def _fill(self, chosen: list[int], by_crops: bool) -> None:
        """Adds to a choice what fills the budget for crops, or for tokens, best."""
        rest = [i for i in range(len(self.buffer)) if i not in chosen]
        tokens = self.max_tokens - sum(self.buffer[i].tokens for i in chosen)
        crops = self.max_crops - sum(self.buffer[i].crops for i in chosen)
        if by_crops:
            fill = best_fill([(self.buffer[i].crops, self.buffer[i].tokens) for i in rest], crops, tokens)
        else:
            fill = best_fill([(self.buffer[i].tokens, self.buffer[i].crops) for i in rest], tokens, crops)
        chosen += [rest[i] for i in fill]

    def _crops_are_scarce(self) -> bool:
        """Whether the waiting examples need clearly more of the crop budget than of the token budget."""
        tokens, crops = sum(w.tokens for w in self.buffer), sum(w.crops for w in self.buffer)
        return crops * self.max_tokens > SCARCE * tokens * self.max_crops


def best_fill(sizes: Sequence[tuple[int, int]], budget: int, other: int) -> list[int]:
    """The choice of examples that uses most of a budget and, among those, least of the other one.

    Args:
        sizes: what each example takes of both budgets, in order of preference: examples behind the first choice that uses all of
            the budget are not looked at.
        budget: to be used as far as possible.
        other: must not be exceeded.

    Returns:
        Indices into `sizes`, ascending.
    """
    # least[b]: least of the other budget in a choice that uses exactly b. taken[k]: where the k-th usable example is in that choice.
    unreachable = other + 1
    least = np.full(budget + 1, unreachable, np.int32)
    least[0] = 0
    usable: list[int] = []
    taken: list[np.ndarray] = []
    for i, (b, o) in enumerate(sizes):
        if least[budget] < unreachable:
            break
        if b > budget or o > other:
            continue
        candidate = least[: budget + 1 - b] + o
        better = candidate < least[b:]
        np.copyto(least[b:], candidate, where=better)
        usable.append(i)
        taken.append(better)
    used = int(np.flatnonzero(least < unreachable)[-1])
    chosen = []
    for i, better in zip(reversed(usable), reversed(taken)):
        before = used - sizes[i][0]
        if before >= 0 and better[before]:
            chosen.append(i)
            used = before
    return chosen[::-1]


def pack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins preprocessed examples into one sequence.

    Positions start again in every example; `subsegment_ids` of the n-th are moved up by n·PACK_STRIDE, which is what keeps the
    attention of the examples apart; pooling indices are moved on to the example's own crops, -1 stays -1, and narrower ones are
    padded with -1 to the widest; the image tokens that points stand for are counted over the whole sequence.

    Returns:
        An example of the same form. Its `metadata` is `{"packed": [...]}`: for every example its own metadata and what `unpack` needs.

    Raises:
        ValueError: the examples do not fit together, or hold what cannot be packed (HeMolmo's inputs).
    """
    if not examples:
        raise ValueError("a pack needs at least one example")
    allowed = {*_SEQUENCES, *_MEDIA, *_POOLED, "subsegment_ids", "point_target_ids", "metadata"}
    unknown = {k for e in examples for k in e} - allowed
    if unknown:
        raise ValueError(f"examples with {', '.join(sorted(unknown))} cannot be packed")
    result: dict[str, Any] = {}
    for key in _SEQUENCES:
        if any(key in e for e in examples):
            result[key] = np.concatenate(_of_all(examples, key))
    lengths = [len(e["input_ids"]) for e in examples]
    segments = [e.get("subsegment_ids", np.zeros(length, np.int64)) for e, length in zip(examples, lengths)]
    result["subsegment_ids"] = np.concatenate([s + n * PACK_STRIDE for n, s in enumerate(segments)])
    with_media = [e for e in examples if "images" in e]
    for key in _MEDIA:
        if any(key in e for e in examples):
            result[key] = np.concatenate(_of_all(with_media, key))
    patches = [e["images"].shape[0] * e["images"].shape[1] if "images" in e else 0 for e in examples]
    starts = np.cumsum([0, *patches])
    for key in _POOLED:
        present = [(e[key], start) for e, start in zip(examples, starts) if key in e]
        if present:
            width = max(index.shape[1] for index, _ in present)
            moved = [np.where(index >= 0, index + start, -1) for index, start in present]
            result[key] = np.concatenate([np.pad(m, ((0, 0), (0, width - m.shape[1])), constant_values=-1) for m in moved])
    tokens = np.cumsum([0, *(len(e.get("pooled_patches_idx", ())) for e in examples)])
    points = [_moved_points(e["point_target_ids"], start) for e, start in zip(examples, tokens) if "point_target_ids" in e]
    if points:
        result["point_target_ids"] = np.concatenate(points)
    result["metadata"] = {"packed": [_description(e) for e in examples]}
    return result


def _moved_points(points: np.ndarray, tokens: int) -> np.ndarray:
    """Points int64 [n, 3] in a sequence that has so many more image tokens in front."""
    chosen = (points[:, :1] >= 0) & (points[:, :1] < NO_MORE_POINTS)
    return points + np.array([tokens, 0, 0]) * chosen


def unpack(packed: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples of which `pack` made a sequence."""
    examples = []
    token = crop = point = 0
    rows = dict.fromkeys(_POOLED, 0)
    for n, description in enumerate(packed["metadata"]["packed"]):
        tokens, crops = slice(token, token + description["tokens"]), slice(crop, crop + description["crops"])
        example = {key: packed[key][tokens] for key in _SEQUENCES if key in packed}
        if description["subsegments"]:
            example["subsegment_ids"] = packed["subsegment_ids"][tokens] - n * PACK_STRIDE
        if description["crops"]:
            example |= {key: packed[key][crops] for key in _MEDIA if key in packed}
        if description["points"]:
            points = packed["point_target_ids"][point : point + description["points"]]
            example["point_target_ids"] = _moved_points(points, -rows["pooled_patches_idx"])
            point += description["points"]
        for key, (count, width) in description["pooled"].items():
            index = packed[key][rows[key] : rows[key] + count, :width]
            example[key] = np.where(index >= 0, index - crop * packed["images"].shape[1], -1)
            rows[key] += count
        examples.append({**example, "metadata": description["metadata"]})
        token, crop = tokens.stop, crops.stop
    return examples


def _of_all(examples: Sequence[dict[str, Any]], key: str) -> list[np.ndarray]:
    """An array of every example, of one kind."""
    missing = [n for n, e in enumerate(examples) if key not in e]
    if missing:
        raise ValueError(f"example {missing[0]} of the pack has no {key}, but others have: training and inference, or models, are mixed")
    arrays = [e[key] for e in examples]
    kinds = {(a.dtype, *a.shape[1:]) for a in arrays}
    if len(kinds) > 1:
        raise ValueError(f"{key} of the pack's examples differ in dtype or shape: {sorted(map(str, kinds))}")
    return arrays


def _description(example: dict[str, Any]) -> dict[str, Any]:
    return {
        "metadata": example.get("metadata", {}),
        "tokens": len(example["input_ids"]),
        "crops": len(example["images"]) if "images" in example else 0,
        "pooled": {key: example[key].shape for key in _POOLED if key in example},
        "subsegments": "subsegment_ids" in example,
        "points": len(example.get("point_target_ids", ())),
    }
