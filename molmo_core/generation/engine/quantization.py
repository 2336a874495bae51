"""Weights of the language model's blocks in float8, for generating."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from molmo_core.nn.float8 import Float8Linear
from molmo_core.nn.lora import LoraLinear

CAPABILITY = (8, 9)
"""Of the first GPUs that convert float8 (Ada, Hopper)."""


@torch.no_grad()
def quantise_blocks(model: Any) -> None:
    """Rounds the linear layers of all blocks to float8, in place and for good; embeddings, norms, head and everything that looks at media
    stay as they are. The memory that this frees is there for others (an engine's cache) afterwards.

    Raises:
        ValueError: this model, or its device, cannot work with such weights.
    """
    _check(model)
    for name, module in list(model.transformer.blocks.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.transformer.blocks.get_submodule(parent), leaf, Float8Linear(module))
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _check(model: Any) -> None:
    if model.config.llm.block_type == "moe":
        raise ValueError("quantization=float8: not for mixtures of experts, whose matrices are no linear layers")
    if any(isinstance(module, LoraLinear) and not module.merged for module in model.modules()):
        raise ValueError("quantization=float8: the model's adapters must be merged before")
    if model.device.type != "cuda":
        return
    capability, dtype = torch.cuda.get_device_capability(model.device), next(model.parameters()).dtype
    if capability < CAPABILITY:
        wanted, found = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        raise ValueError(f"quantization=float8: needs a GPU of compute capability {wanted} (Ada, Hopper) or newer; this one has {found}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"quantization=float8: on a GPU dtype must be bfloat16 or float16, not {str(dtype).removeprefix('torch.')}")
