"""What a block keeps for its backward pass, and what it computes again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]
"""`none` keeps everything; `selective` keeps the results of matrix products and of attention and computes what lies between (norms,
rotations, activations) again; `full` keeps only the input of a block."""

T = TypeVar("T")

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten.max.default,  # the largest number of a tensor, for a scale of float8: one number instead of a pass over it
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    flex_attention,
}


def recomputed(run: Callable[[torch.Tensor], T], x: torch.Tensor, policy: Recompute) -> T:
    """`run(x)`, keeping for the backward pass what the policy says.

    What else `run` reads comes in its closure: an argument of checkpoint that is a number would have every block compiled for itself.
    """
    if policy == "none" or not torch.is_grad_enabled():
        return run(x)
    if policy == "full":
        return checkpoint(run, x, use_reentrant=False)
    return checkpoint(run, x, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, _policy))


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
