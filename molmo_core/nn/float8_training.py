"""Linear layers that train with products in float8, forward and backward: GPUs of NVIDIA's Ada and Hopper generations and later
multiply at twice their bfloat16 rate.

A tensor is divided by a scale of its own, so that its largest number is the largest of the type, when it is used (dynamic scaling, one
scale a tensor; Micikevicius et al., 2022): inputs and weights as e4m3, gradients as e5m2, which has less precision and more range. Sums
are float32. Weights stay what they are, and their gradients have their type. Elsewhere than on a GPU the same numbers are multiplied as
float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What cuBLAS wants every side of a product to be a multiple of."""
_SMALLEST = 1e-20
"""Of scales: a tensor of zeros has one, too."""


def float8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x · weightᵀ + bias in float8, with gradients.

    Args:
        x: [..., in], of any floating-point type.
        weight: [out, in]; both are multiples of `MULTIPLE`.
        bias: [out], added in the type of the result.

    Returns:
        [..., out], of the type of autocast where that is on, else of x.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    rows = x.flatten(0, -2)
    count = rows.shape[0]
    if count % MULTIPLE:  # the weight's gradient is summed over them; zeros change no scale
        rows = F.pad(rows, (0, 0, 0, -count % MULTIPLE))
    out = _Linear.apply(rows, weight, dtype)[:count].unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias.to(dtype)


def quantised(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale in a type of float8, and scale, float32 []. What is not finite makes numbers that are not."""
    scale = (x.abs().max().float() / torch.finfo(dtype).max).clamp(min=_SMALLEST)
    return _divided(x, scale, dtype), scale


def _divided(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.float() / scale).to(dtype)


def _product(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype, fast: bool = False
) -> torch.Tensor:
    """a [m, k] · b [n, k]ᵀ, both contiguous: the one order that Hopper multiplies float8 in. `fast` sums with fewer bits."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)
    return (torch.mm(a.float(), b.float().t()) * (scale_a * scale_b)).to(dtype)


class _Linear(torch.autograd.Function):
    """x [n, in], weight [out, in], dtype of the result [n, out]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x8, x_scale = quantised(x, E4M3)
        w8, w_scale = quantised(weight, E4M3)
        # Of the weight the parameter itself: FSDP frees it until the backward pass, a copy in float8 would stay.
        ctx.save_for_backward(x8 if ctx.needs_input_grad[1] else None, x_scale, weight, w_scale)
        ctx.x_dtype = x.dtype
        return _product(x8, w8, x_scale, w_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:  # type: ignore[override]
        x8, x_scale, weight, w_scale = ctx.saved_tensors
        g8, g_scale = quantised(gradient, E5M2)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            w8 = _divided(weight, w_scale, E4M3)
            of_x = _product(g8, w8.t().contiguous(), g_scale, w_scale, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            of_weight = _product(g8.t().contiguous(), x8.t().contiguous(), g_scale, x_scale, weight.dtype)
        return of_x, of_weight, None
