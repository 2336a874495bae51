"""Stochastic rounding to bfloat16: up or down with the probability that makes the mean right.

A bfloat16 number has 8 bits of precision. An update below 1/512 of a weight is lost when the sum is rounded to nearest, in every step
again: at a learning rate of 1e-5 most weights would never move. Rounded stochastically, one of many small updates moves the weight by a
whole step, and on average it goes where float32 would have gone.

The random bits are a hash of (seed, position in the whole parameter): the same on a CPU and a GPU, on any number of ranks and on
replicas, with no state to save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

LOW = 0xFFFF
"""The bits of a float32 number that bfloat16 does not have."""


def random_bits(seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """32 random bits for each position: int32 seed (a scalar), int32 positions -> int32 (the "lowbias32" hash, arithmetic modulo 2^32)."""
    x = positions ^ seed
    x = (x ^ ((x >> 16) & LOW)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97
    return x ^ ((x >> 15) & 0x1FFFF)


def rounded(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Float32 values, rounded to bfloat16 by the low 16 of the bits int32 of the same shape. What is not finite stays as it is."""
    raw = values.view(torch.int32)
    up = ((raw + (bits & LOW)) & ~LOW).view(torch.float32)
    return torch.where(values.isfinite(), up, values).to(torch.bfloat16)


def first_position(parameter: torch.Tensor) -> int:
    """Where this rank's part of a parameter begins in the flattened whole."""
    if not isinstance(parameter, DTensor):
        return 0
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            mesh = parameter.device_mesh
            chunk = -(-parameter.shape[0] // mesh.size(dimension))
            first = min(chunk * mesh.get_local_rank(dimension), parameter.shape[0])
            return first * (parameter.numel() // max(1, parameter.shape[0]))
    return 0


def local(tensor: Any) -> torch.Tensor:
    """This rank's part of a tensor (a view on it)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
