"""Which tokens of a batch see which: the attention rule's input, from token ids."""

from __future__ import annotations

import torch

from molmo_core.nn.attention import SequenceLayout
from molmo_core.nn.configs import BidirectionalAttention
from molmo_core.nn.host import constant
from molmo_core.tokens import PACK_STRIDE, ImageTokenIds


def in_image(input_ids: torch.Tensor, tokens: ImageTokenIds) -> torch.Tensor:
    """bool, same shape: the token is part of an image."""
    return torch.isin(input_ids, constant(tokens.all, input_ids.device))


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
    image = in_image(input_ids, tokens)
    pack = torch.zeros_like(input_ids) if segments is None else segments // PACK_STRIDE
    if mode == "within_image":
        opens = torch.isin(input_ids, constant(tokens.openers, input_ids.device))
        group = pack * (input_ids.shape[1] + 1) + opens.cumsum(-1)
    else:
        group = pack
    questions = None
    if mode == "image_to_question":
        questions = torch.ones_like(image) if response is None else ~response
    return SequenceLayout(valid, segments, torch.where(image, group, -1), questions)
