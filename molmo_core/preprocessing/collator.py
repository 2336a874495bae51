"""From preprocessed examples (numpy) to one batch (torch). `tensors` is the only part of preprocessing that imports
torch, and only when called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

PadMode = Literal["to_max"] | None
Empty = Callable[..., np.ndarray]

# Padding value of every array of a preprocessed example; the first axis is padded, then the others to the widest of the batch.
SEQUENCE_PADDING: dict[str, float] = {"input_ids": -1, "labels": -1, "loss_masks": 0.0, "position_ids": -1, "subsegment_ids": -1}
MEDIA_PADDING: dict[str, float] = {
    "images": 0,
    "image_masks": 0.0,
    "pooled_patches_idx": -1,
    "low_res_pooled_idx": -1,
    "high_res_pooled_idx": -1,
    "low_res_tokens_idx": -1,
    "high_res_tokens_idx": -1,
    "high_res_pos_ids": -1,
    "high_res_features_weights": 0.0,
    "point_target_ids": -1,
    "low_to_high": 0.0,
}


class MMCollator:
    """Pads and stacks examples of any of the models; text-only and image examples may be mixed.

    Args:
        max_sequence_length: longest sequence allowed; None = any (then `pad_mode` must be None).
        pad_mode: `to_max` pads sequences to `max_sequence_length`, None to the longest of the batch; media always to the largest of it.
        include_metadata: keep `metadata`, as a list.
    """

    def __init__(self, max_sequence_length: int | None = None, pad_mode: PadMode = None, include_metadata: bool = True):
        if pad_mode not in ("to_max", None):
            raise ValueError(f"pad_mode={pad_mode!r}: expected 'to_max' or None")
        if pad_mode == "to_max" and max_sequence_length is None:
            raise ValueError("pad_mode='to_max' needs max_sequence_length")
        self.max_sequence_length = max_sequence_length
        self.pad_mode = pad_mode
        self.include_metadata = include_metadata

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collates examples.

        Returns:
            Tensors with a batch axis in front (dtypes as in the examples) and, if asked for, `metadata`: a list of dicts.

        Raises:
            ValueError: no examples, a sequence longer than allowed, an unknown key, or examples that do not fit together.
        """
        return tensors(self.arrays(examples))

    def arrays(self, examples: Sequence[dict[str, Any]], empty: Empty = np.empty) -> dict[str, Any]:
        """The same batch as numpy arrays, made without torch, in memory that `empty` (as numpy's) gives."""
        if not examples:
            raise ValueError("a batch needs at least one example")
        keys = {k for e in examples for k in e if k != "metadata"}
        unknown = keys - SEQUENCE_PADDING.keys() - MEDIA_PADDING.keys()
        if unknown:
            raise ValueError(f"unknown keys in a preprocessed example: {sorted(unknown)}")
        length = self._length([len(e["input_ids"]) for e in examples])
        batch: dict[str, Any] = {}
        for key in [k for k in (*SEQUENCE_PADDING, *MEDIA_PADDING) if k in keys]:
            arrays = [e.get(key) for e in examples]
            if key in SEQUENCE_PADDING:
                arrays = [_absent_sequence(key, e) if a is None else a for a, e in zip(arrays, examples)]
                batch[key] = _pad(key, arrays, SEQUENCE_PADDING[key], length, empty)
            else:
                batch[key] = _pad(key, arrays, MEDIA_PADDING[key], None, empty)
        if self.include_metadata:
            batch["metadata"] = [e.get("metadata", {}) for e in examples]
        return batch

    def join(self, batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Numpy batches one after the other, as if their examples had been collated together; a single one is not copied."""
        return batches[0] if len(batches) == 1 else self.arrays([row for batch in batches for row in _rows(batch)])

    def _length(self, lengths: list[int]) -> int:
        longest, limit = max(lengths), self.max_sequence_length
        if limit is not None and longest > limit:
            raise ValueError(
                f"example {lengths.index(longest)} of the batch has {longest} tokens, more than the {limit} of the collator; "
                "build the preprocessor with max_seq_len, or raise the sequence length"
            )
        return limit if self.pad_mode == "to_max" and limit is not None else longest


def tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """A numpy batch as tensors that share its memory."""
    import torch

    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}


def _rows(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The examples of a numpy batch: sequences without their padding; that of media does not matter when they are collated again."""
    for i, ids in enumerate(batch["input_ids"]):
        length = np.count_nonzero(ids != SEQUENCE_PADDING["input_ids"])
        yield {key: values[i][:length] if key in SEQUENCE_PADDING else values[i] for key, values in batch.items()}


def _absent_sequence(key: str, example: dict[str, Any]) -> np.ndarray:
    """A sequence array that only other examples of the batch have."""
    length = len(example["input_ids"])
    if key == "subsegment_ids":  # one segment: everything sees everything before it
        return np.zeros(length, np.int64)
    if key == "position_ids":
        return np.arange(length)
    raise ValueError(f"some examples of the batch have {key} and others do not: training and inference examples cannot be mixed")


def _pad(key: str, arrays: Sequence[np.ndarray | None], value: float, length: int | None, empty: Empty) -> np.ndarray:
    """Stacks arrays, each axis padded to its maximum (the first to `length` if given); absent ones are all padding."""
    present = [a for a in arrays if a is not None]
    dtypes, ranks = {a.dtype for a in present}, {a.ndim for a in present}
    if len(dtypes) > 1 or len(ranks) > 1:
        raise ValueError(f"{key} of the batch differ in kind: dtypes {sorted(map(str, dtypes))}, axes {sorted(ranks)}")
    shape = [max(sizes) for sizes in zip(*(a.shape for a in present))]
    if length is not None:
        shape[0] = length
    if key == "images" and len({a.shape[1:] for a in present}) > 1:
        raise ValueError(f"images of the batch differ in patches: {sorted({a.shape[1:] for a in present})}")
    batch = empty((len(arrays), *shape), present[0].dtype)
    for row, array in zip(batch, arrays):
        if array is None or array.shape != row.shape:
            row.fill(value)
        if array is not None:
            row[tuple(slice(n) for n in array.shape)] = array
    return batch
