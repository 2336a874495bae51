"""The linear layers of the language model: they train in float8 where that is asked for, and on a GPU a single row without a gradient is
multiplied by a kernel of our own.

For one row cuBLAS reads the weights at 61 to 89 % of an H100's bandwidth (3.0 TB/s), this kernel at 79 to 96 % (Molmo2-4B's shapes,
bfloat16, one run; docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import nn

from molmo_core.nn.float8_training import float8_linear


class Linear(nn.Linear):
    """`nn.Linear`, faster for a single row."""

    float8 = False
    """Whether products that are trained through are computed in float8 (`nn.float8_training`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        weight = self.weight
        if self.float8 and torch.is_grad_enabled():
            return float8_linear(x, weight, self.bias)
        if x.is_cuda and x.numel() == x.shape[-1] and not torch.is_grad_enabled() and x.dtype == weight.dtype and weight.is_contiguous():
            from molmo_core.nn.row_kernel import fits, multiply  # Triton is there with a GPU only

            if fits(weight):
                out = multiply(x.reshape(-1), weight).view(*x.shape[:-1], -1)
                return out if self.bias is None else out + self.bias
        return super().forward(x)
