"""Facts about tokens that models, preprocessing and checkpoints share. Plain Python, below all of them: no torch, no numpy.

The embedding table of a language model has E rows (`llm.embedding_rows`). The special tokens are the rows after it: the id of a
special token is E + its index in its layout.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

TokenLayout = Literal["molmo", "molmo2"]
"""Which special tokens there are: those of Molmo, VideoOlmo and HeMolmo, or those of Molmo2 and MolmoPoint."""

IMAGE_PROMPT = "<|image|>"
VIDEO_PROMPT = "<|video|>"

# Position in the list = index after the embedding table. Sources: published Molmo code, Molmo2 tokenizer.
SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "molmo": ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", IMAGE_PROMPT, "<im_low>"),
    "molmo2": (
        "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", IMAGE_PROMPT, "<im_low>", "<frame_start>", "<frame_end>",
        VIDEO_PROMPT, "<|points|>", "<|token_index|>", "<|vit_index|>", "<|vit_loc|>",
    ),
}  # fmt: skip

POINT_TOKENS = ("<|token_index|>", "<|vit_index|>", "<|vit_loc|>")
"""A point of MolmoPoint: an image token, one of its patches, a cell of the patch. Which ones they are stands beside the tokens."""
NO_MORE_POINTS = 1_000_000
"""Stands for an image token where a list of points ends."""

SHARED_SEGMENT = 10_000
"""`subsegment_ids` of the tokens that all annotations of a message tree see; annotation k has k."""
PACK_STRIDE = 100_000
"""`subsegment_ids` of the n-th example of a pack are moved up by n·PACK_STRIDE."""


def special_ids(layout: TokenLayout, first: int) -> dict[str, int]:
    """Ids of the special tokens by their text; `first` is the id of the first (E)."""
    return {token: first + index for index, token in enumerate(SPECIAL_TOKENS[layout])}


@dataclasses.dataclass(frozen=True)
class ImageTokenIds:
    """Ids of the tokens that form an image (None: the layout has no such token)."""

    start: int
    end: int
    patch: int
    col: int
    low: int
    low_res_start: int | None = None
    frame_start: int | None = None
    frame_end: int | None = None

    @classmethod
    def of(cls, layout: TokenLayout, first: int) -> ImageTokenIds:
        """The ids of a layout; `first` is the id of the first special token (E)."""
        ids = special_ids(layout, first)
        return cls(
            start=ids["<im_start>"], end=ids["<im_end>"], patch=ids["<im_patch>"], col=ids["<im_col>"], low=ids["<im_low>"],
            low_res_start=ids.get("<low_res_im_start>"), frame_start=ids.get("<frame_start>"), frame_end=ids.get("<frame_end>"),
        )  # fmt: skip

    @property
    def all(self) -> tuple[int, ...]:
        """Every id of the layout."""
        return tuple(i for i in dataclasses.astuple(self) if i is not None)

    @property
    def openers(self) -> tuple[int, ...]:
        """Ids that begin an image: in Molmo every view (global, high resolution) is its own, in Molmo2 the views are one image."""
        if self.low_res_start is None:
            return (self.start,)
        return tuple(i for i in (self.low_res_start, self.frame_start) if i is not None)


@dataclasses.dataclass(frozen=True)
class PointTokenIds:
    """Ids of the tokens that form a point."""

    token: int
    patch: int
    cell: int

    @classmethod
    def of(cls, layout: TokenLayout, first: int) -> PointTokenIds:
        """The ids of a layout that has them; `first` is the id of the first special token (E)."""
        ids = special_ids(layout, first)
        return cls(*(ids[name] for name in POINT_TOKENS))
