"""What the inputs of `forward` say about each token: whether it is real, where it stands, whether it belongs to an answer."""

from __future__ import annotations

from typing import Any

import torch


def check_shapes(batch: dict[str, Any]) -> None:
    """Inputs with one value a token have the shape of the tokens (one row may serve all).

    Raises:
        ValueError: one has another shape.
    """
    rows, length = batch["input_ids"].shape
    for name in ("position_ids", "subsegment_ids", "loss_masks", "response_mask"):
        value = batch[name]
        if value is not None and tuple(value.shape) not in ((rows, length), (1, length)):
            raise ValueError(f"{name} {tuple(value.shape)} must have the shape of input_ids, {(rows, length)}")
    mask = batch["attention_mask"]
    if mask is not None and mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask {tuple(mask.shape)} is [B, K] (1 = a real token) or a finished mask [B, 1, S, K]")


def valid_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past: int) -> torch.Tensor:
    """bool [B, P + S]: real tokens of cache and call."""
    batch, length = input_ids.shape
    if attention_mask is not None and attention_mask.dim() == 2:
        if attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must cover the cache and this call: [{batch}, {past} + {length}]"
            )
        return attention_mask != 0
    return torch.cat((input_ids.new_ones(batch, past, dtype=torch.bool), input_ids >= 0), dim=1)


def default_positions(valid: torch.Tensor, past: int) -> torch.Tensor:
    """Rotary positions int64 [B, S]: real tokens counted from 0; padding repeats the last one."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def last_positions(valid: torch.Tensor) -> torch.Tensor:
    """int64 [B]: the last real token of each row [B, S]."""
    return (valid.long() * torch.arange(1, valid.shape[1] + 1, device=valid.device)).argmax(1)


def response_tokens(batch: dict[str, Any]) -> torch.Tensor | None:
    """bool [B, S], tokens of answers: as given, or where the loss has weight."""
    if batch["response_mask"] is None and batch["loss_masks"] is not None:
        return batch["loss_masks"] > 0
    return None if batch["response_mask"] is None else batch["response_mask"] != 0
