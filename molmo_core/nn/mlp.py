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


class VitMlp(nn.Module):
    """Two linear layers with biases around an activation."""

    def __init__(self, size: int, hidden: int, activation_name: str):
        super().__init__()
        self.activation_name = activation_name
        self.w1 = nn.Linear(size, hidden)
        self.w2 = nn.Linear(hidden, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
