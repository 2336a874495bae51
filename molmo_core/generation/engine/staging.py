"""From the host to the device without waiting for what the device is doing."""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; to a GPU by way of pinned memory, so that the copy takes its turn behind the work that is queued there."""
    tensor = torch.from_numpy(np.require(array, requirements=("C", "W")))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
