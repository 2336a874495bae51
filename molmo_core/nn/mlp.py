"""Feed-forward parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def fused_swiglu(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU of a fused projection [..., 2·I] whose first half is "up" and whose SECOND half is the gate; [..., I]."""
    up, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """The activations of the vision encoders: quick_gelu, gelu, gelu_pytorch_tanh."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


@torch.library.custom_op("molmo_core::linear_gelu", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor")
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU (tanh form) of a linear layer of [..., in], as part of its product. A custom operator, because the compiler takes it apart."""
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class VitMlp(nn.Module):
    """Two linear layers with biases around an activation; the tanh form of GELU is part of the first on a GPU without gradients."""

    def __init__(self, size: int, hidden: int, activation_name: str):
        super().__init__()
        self.activation_name = activation_name
        self.w1 = nn.Linear(size, hidden)
        self.w2 = nn.Linear(hidden, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = type(self.w1) is nn.Linear  # not one with an adapter
        tanh = self.activation_name == "gelu_pytorch_tanh"
        if x.is_cuda and plain and tanh and not torch.is_grad_enabled() and x.dtype == self.w1.weight.dtype:
            return self.w2(linear_gelu(x, self.w1.weight, self.w1.bias))
        return self.w2(activation(self.activation_name, self.w1(x)))


class GatedMlp(nn.Module):
    """w2(silu(w1 x) · w3 x), without biases: the image projector."""

    def __init__(self, size: int, hidden: int, out: int):
        super().__init__()
        self.w1 = nn.Linear(size, hidden, bias=False)
        self.w2 = nn.Linear(hidden, out, bias=False)
        self.w3 = nn.Linear(size, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
