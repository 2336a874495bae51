"""Random first weights, drawn on every device for itself and the same on any number of them."""

from __future__ import annotations

import zlib
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from molmo_core.checkpoint.links import clean_name, fill
from molmo_core.models.base import ModelBase
from molmo_core.nn.lora import adapted_layers

DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


def draw_weights(model: ModelBase, seed: int) -> None:
    """Gives a model, which may be sharded, the weights of `reset_parameters`.

    A parameter's numbers depend on the seed, its name, its shape and the kind of device, not on who holds which part of it: each rank
    draws a parameter whole, one at a time, and keeps its part. That takes a second where a GPU draws 4 billion, and nothing is sent.
    """
    with _Draws(_seeds(model, seed)):
        model.reset_parameters()


def draw_adapters(model: ModelBase, seed: int) -> None:
    """Gives the adapters of a model, if it has any, their first values, by the same rule."""
    with _Draws(_seeds(model, seed)):
        for layer in adapted_layers(model):
            layer.reset_adapter()


def _seeds(model: ModelBase, seed: int) -> dict[int, int]:
    return {id(p): zlib.crc32(f"{seed} {clean_name(name)}".encode()) for name, p in model.named_parameters()}  # CPUs read 32 bits


class _Draws(TorchDispatchMode):
    """Draws into parameters from generators of their own."""

    def __init__(self, seeds: dict[int, int]):
        """`seeds` by the identity of the parameter."""
        super().__init__()
        self.seeds = seeds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in DRAWS:
            return func(*args, **kwargs)
        parameter: torch.Tensor = args[0]
        generator = torch.Generator(parameter.device).manual_seed(self.seeds[id(parameter)])
        if not isinstance(parameter, DTensor):
            return func(*args, **kwargs | {"generator": generator})
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        func(whole, *args[1:], **kwargs | {"generator": generator})
        fill(cast(torch.Tensor, parameter), whole)
        return parameter
