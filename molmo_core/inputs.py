"""What `forward` takes, as typed tensors (what it returns: `molmo_core.outputs`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from molmo_core.nn.host import to_device
from molmo_core.nn.loss import loss_positions


class Inputs(NamedTuple):
    """The inputs of one call: B rows, S tokens of this call, P tokens already in a cache. Absent ones are None.

    `Inputs(input_ids, positions)` is enough to decode.
    """

    input_ids: torch.Tensor
    """int64 [B, S]; -1 is padding."""
    positions: torch.Tensor
    """int64 [B, S], rotary positions."""
    valid: torch.Tensor | None = None
    """bool [B, P + S], real tokens of cache and call; None = all."""
    response: torch.Tensor | None = None
    """bool [B, S], tokens of answers."""
    segments: torch.Tensor | None = None
    """int64 [B, S] `subsegment_ids`."""
    mask: torch.Tensor | None = None
    """A finished mask, bool or additive [B, 1, S, P + S]."""
    images: torch.Tensor | None = None
    image_masks: torch.Tensor | None = None
    image_input_idx: torch.Tensor | None = None
    pooled_patches_idx: torch.Tensor | None = None
    features: Mapping[str, torch.Tensor] = {}
    """What only some models take, by name."""
    labels: torch.Tensor | None = None
    """int64 [B, S], the target of each position."""
    loss_masks: torch.Tensor | None = None
    """float [B, S], weights of the positions in the loss."""
    loss_positions: torch.Tensor | None = None
    """int64 [n], the positions with a weight among all [B · S]; None = look at all."""
    past: int = 0
    """P."""

    @classmethod
    def of(
        cls,
        past: int,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        subsegment_ids: torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_masks: torch.Tensor | None = None,
        loss_positions: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.Tensor | None = None,
        pooled_patches_idx: torch.Tensor | None = None,
        **features: torch.Tensor | None,
    ) -> Inputs:
        """From tensors with a batch axis, named as in `forward`, and the number of tokens in the cache.

        Raises:
            ValueError: a shape does not fit the tokens.
        """
        shape = tuple(input_ids.shape)
        each = {"position_ids": position_ids, "subsegment_ids": subsegment_ids, "loss_masks": loss_masks, "response_mask": response_mask}
        for name, value in each.items():  # one row may serve all
            if value is not None and tuple(value.shape) not in (shape, (1, shape[1])):
                raise ValueError(f"{name} {tuple(value.shape)} must have the shape of input_ids, {shape}")
        valid = valid_tokens(input_ids, attention_mask, past)
        positions = default_positions(valid, past) if position_ids is None else position_ids.clamp(min=0)
        if response_mask is None and loss_masks is not None:
            response: torch.Tensor | None = loss_masks > 0
        else:
            response = None if response_mask is None else response_mask != 0
        return cls(
            input_ids=input_ids,
            positions=positions,
            # A decoding step without a mask: all are real, and no mask has to be made of that.
            valid=None if past and shape[1] == 1 and attention_mask is None else valid,
            response=response,
            segments=subsegment_ids,
            mask=attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None,
            images=images,
            image_masks=image_masks,
            image_input_idx=image_input_idx,
            pooled_patches_idx=pooled_patches_idx,
            features={name: value for name, value in features.items() if value is not None},
            labels=labels,
            loss_masks=loss_masks,
            loss_positions=loss_positions,
            past=past,
        )

    @property
    def real(self) -> torch.Tensor | None:
        """bool [B, S], real tokens of this call; None = all."""
        return None if self.valid is None else self.valid[:, self.past :]

    @property
    def token_ids(self) -> torch.Tensor:
        """int64 [B, S], ids that have an embedding: 0 where there is padding."""
        ids = self.input_ids if self.real is None else self.input_ids.masked_fill(~self.real, 0)
        return ids.clamp(min=0)

    def last_positions(self) -> torch.Tensor:
        """int64 [B]: the last real token of each row."""
        return last_positions(torch.ones_like(self.input_ids) if self.real is None else self.real)

    def first(self, length: int) -> Inputs:
        """The first `length` tokens of a call without a cache, without what belongs to images and loss."""
        return Inputs(
            self.input_ids[:, :length],
            self.positions[:, :length],
            None if self.valid is None else self.valid[:, :length],
            None if self.response is None else self.response[:, :length],
            None if self.segments is None else self.segments[:, :length],
            None if self.mask is None else self.mask[:, :, :length, :length],
        )


class Targets(NamedTuple):
    """What the loss is computed from; see `Molmo.forward`."""

    labels: torch.Tensor
    loss_masks: torch.Tensor | None = None
    divisor: torch.Tensor | float | None = None
    z_loss_weight: float = 0.0
    positions: torch.Tensor | None = None
    """int64 [n], the only positions [B · S] with a weight; None = look at all."""


def as_batch(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors with a batch axis on `device`, which nothing here waits for.

    Arrays and lists are converted; if `input_ids` is one example [S], all get an axis. If the labels come from the host, it finds
    `loss_positions`.
    """
    tensors = {k: _tensor(v) if isinstance(v, np.ndarray | list) else v for k, v in inputs.items()}
    if tensors["input_ids"].dim() == 1:
        tensors = {k: v[None] if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    labels, masks = tensors.get("labels"), tensors.get("loss_masks")
    if labels is not None and tensors.get("loss_positions") is None:
        on_host = all(t is None or t.device.type == "cpu" for t in (labels, masks))
        if on_host and (masks is None or masks.shape[1:] == labels.shape[1:]):
            tensors["loss_positions"] = loss_positions(labels, masks)
    return {k: to_device(v, device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


def valid_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past: int) -> torch.Tensor:
    """bool [B, P + S]: real tokens of cache and call.

    Raises:
        ValueError: a mask of another shape.
    """
    batch, length = input_ids.shape
    if attention_mask is not None and attention_mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} is [B, K] (1 = a real token) or a finished mask [B, 1, S, K]")
    if attention_mask is not None and attention_mask.dim() == 2:
        if attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must cover the cache and this call: [{batch}, {past} + {length}]"
            )
        return attention_mask != 0
    return torch.cat((input_ids.new_ones(batch, past, dtype=torch.bool), input_ids >= 0), dim=1)


def default_positions(valid: torch.Tensor, past: int = 0) -> torch.Tensor:
    """Rotary positions int64 [B, S]: real tokens counted from 0; padding repeats the last one."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def last_positions(valid: torch.Tensor) -> torch.Tensor:
    """int64 [B]: the last real token of each row [B, S]."""
    return (valid.long() * torch.arange(1, valid.shape[1] + 1, device=valid.device)).argmax(1)


def _tensor(value: np.ndarray | list[Any]) -> torch.Tensor:
    """Without a copy where possible (torch does not take read-only arrays)."""
    return torch.as_tensor(value) if isinstance(value, list) or value.flags.writeable else torch.tensor(value)
