"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """Scales the last axis to unit root mean square, then by a learned weight.

    The statistics are float32 whatever the dtype of the input and of the weights; the weight multiplies after the cast back,
    as in the published code (so bfloat16 checkpoints give the published numbers).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = x.float()
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
            return self.weight * y.to(x.dtype)
