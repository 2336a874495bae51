"""Low-rank adapters (LoRA): beside a matrix W that stays as it is, two thin ones are trained, and W + scale · B·A is what counts.

Of our own because names of parameters are the published ones here (docs/architecture.md, decision 1): an adapted layer keeps its `weight`
and `bias`, so that loading, sharding, compilation and export need not know of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from molmo_core.nn.linear import Linear

_NAMES = ("lora_a", "lora_b")


class LoraLinear(Linear):
    """A linear layer with an adapter: x·Wᵀ (+ bias) + scale · x·Aᵀ·Bᵀ."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        """Takes over the parameters of `base`; the new ones have its dtype and device, and no values yet (`reset_adapter`).

        A is [rank, in], B is [out, rank].
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_empty(base.out_features, rank))
        self.scale = scale
        self.merged = False
        """Whether `weight` has the adapter in it."""

    def reset_adapter(self) -> None:
        """A is random, B is zero: the model is the one that it was."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        out = super().forward(x)
        return out if self.merged else out + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the adapter to the weight, for good. Of a sharded layer (rows, as FSDP2 shards) all ranks call it."""
        if self.merged:
            return
        a: torch.Tensor = self.lora_a
        b: torch.Tensor = self.lora_b
        weight: torch.Tensor = self.weight
        if isinstance(a, DTensor) and isinstance(b, DTensor) and isinstance(weight, DTensor):
            a, b, weight = a.full_tensor(), b.to_local(), weight.to_local()
        weight += (self.scale * (b.float() @ a.float())).to(weight.dtype)
        self.merged = True


def add_adapters(model: nn.Module, parts: tuple[str, ...], rank: int, alpha: float) -> None:
    """Gives the linear layers of a model's parts adapters, with scale `alpha` / `rank`; `parts` are prefixes of their names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(parts):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoraLinear(module, rank, alpha / rank))


def adapted_layers(model: nn.Module) -> Iterator[LoraLinear]:
    """The layers that have adapters."""
    return (module for module in model.modules() if isinstance(module, LoraLinear))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name."""
    return name.endswith(_NAMES)
