"""From the host to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`. For a GPU it goes through pinned memory: a copy from other memory would first wait for all work given
    to the device before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def constant(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """A few numbers [n], as `torch.tensor` makes them."""
    return to_device(torch.tensor(values), device)
