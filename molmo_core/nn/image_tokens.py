"""Which token ids stand for images, and which of them form a bidirectional block."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from molmo_core.nn.attention import PACK_STRIDE, SequenceLayout

BidirectionalAttention = Literal["image_tokens", "within_image", "image_to_question"]
"""`image_tokens`: all image tokens of an example see each other; `within_image`: those of one image (one view, one frame);
`image_to_question`: image tokens also see the tokens that are not part of an answer."""


@dataclasses.dataclass(frozen=True)
class ImageTokenIds:
    """Ids of the image tokens of one layout (None: the layout has no such token)."""

    start: int
    end: int
    patch: int
    col: int
    low: int | None = None
    low_res_start: int | None = None
    frame_start: int | None = None
    frame_end: int | None = None

    @classmethod
    def molmo(cls, first: int) -> ImageTokenIds:
        """The layout of Molmo, VideoOlmo and HeMolmo; `first` is the id of the first special token (`llm.embedding_rows`)."""
        return cls(start=first, end=first + 1, patch=first + 2, col=first + 3, low=first + 5)

    @classmethod
    def molmo2(cls, first: int) -> ImageTokenIds:
        """The layout of Molmo2."""
        return cls(
            start=first, end=first + 1, patch=first + 2, col=first + 3, low_res_start=first + 4, low=first + 6,
            frame_start=first + 7, frame_end=first + 8,
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

    def contains(self, input_ids: torch.Tensor) -> torch.Tensor:
        """bool, same shape: the token is part of an image."""
        return torch.isin(input_ids, torch.tensor(self.all, device=input_ids.device))


def sequence_layout(
    input_ids: torch.Tensor,
    tokens: ImageTokenIds,
    mode: BidirectionalAttention | None = None,
    valid: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    response: torch.Tensor | None = None,
) -> SequenceLayout:
    """The layout of a batch.

    Args:
        input_ids: int64 [B, S].
        tokens: the ids of image tokens.
        mode: bidirectional attention among image tokens; None = causal.
        valid: bool [B, S], real tokens; None = all.
        segments: int64 [B, S] `subsegment_ids`.
        response: bool [B, S], tokens of answers (`image_to_question` only; None = no token is).
    """
    if mode is None:
        return SequenceLayout(valid, segments)
    image = tokens.contains(input_ids)
    pack = torch.zeros_like(input_ids) if segments is None else segments // PACK_STRIDE
    if mode == "within_image":
        opens = torch.isin(input_ids, torch.tensor(tokens.openers, device=input_ids.device))
        group = pack * (input_ids.shape[1] + 1) + opens.cumsum(-1)
    else:
        group = pack
    questions = None
    if mode == "image_to_question":
        questions = torch.ones_like(image) if response is None else ~response
    return SequenceLayout(valid, segments, torch.where(image, group, -1), questions)
