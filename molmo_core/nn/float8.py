"""Linear layers with weights in float8: half the bytes of bfloat16, which is what a step of few rows waits for."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Quantised(NamedTuple):
    """A matrix in float8."""

    weight: torch.Tensor
    """float8_e4m3fn [out, in]: a row's largest number is 448, the largest that there is."""
    scales: torch.Tensor
    """float32 [out]: factors of the rows."""


def quantise(weight: torch.Tensor) -> Quantised:
    """A matrix [out, in] in float8.

    Raises:
        ValueError: a number is not finite.
    """
    largest = weight.abs().amax(1).float()
    if not largest.isfinite().all():
        raise ValueError("weights that are not finite cannot be kept in float8")
    scales = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros stays one
    return Quantised((weight.float() / scales[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales)


class Float8Linear(nn.Module):
    """A linear layer for inference. Activations and sums are as they were; only the numbers of the matrix are rounded.

    On a GPU one row and few rows are multiplied by kernels that read float8, more by cuBLAS with a copy of the matrix in the rows' dtype,
    which is made each time: it costs little beside the product. Elsewhere such a copy is made always.
    """

    weight: torch.Tensor
    """float8_e4m3fn [out, in]."""
    scales: torch.Tensor
    """float32 [out]."""

    def __init__(self, base: nn.Linear):
        """Rounds the weight of `base`, and takes over its bias.

        Raises:
            ValueError: a weight is not finite.
        """
        super().__init__()
        weight, scales = quantise(base.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.bias = base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        out = self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(self.weight))
        return out if self.bias is None else out + self.bias

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cuda:
            return F.linear(x, (self.weight.float() * self.scales[:, None]).to(x.dtype))
        from molmo_core.nn import float8_kernels, row_kernel  # Triton is there with a GPU only

        x = x.contiguous()
        if len(x) == 1 and row_kernel.fits(self.weight):
            return row_kernel.multiply(x[0], self.weight, self.scales)[None]
        if float8_kernels.fits(x, self.weight):
            return float8_kernels.multiply(x, self.weight, self.scales)
        return F.linear(x, float8_kernels.dequantise(self.weight, self.scales, x.dtype))
