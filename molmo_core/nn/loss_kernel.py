"""Cross entropy of rows of logits and its gradient, which takes the place of the logits: two reads and one write of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192


def rows(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_weight: float, differentiable: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `Rows` of `molmo_core.nn.loss`, float32 [3, n], and the gradient, which is written over the logits."""
    logits = logits.contiguous()
    n, columns = logits.shape
    each = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    _rows[(n,)](logits, labels, weights, each, z_weight, n, columns, differentiable, BLOCK, num_warps=16)
    return each, logits if differentiable else None


@triton.jit
def _rows(logits, labels, weights, each, z_weight, n, columns, DIFFERENTIABLE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * columns
    weight = tl.load(weights + row)
    label = tl.load(labels + row)
    offsets = tl.arange(0, BLOCK)
    if weight > 0:
        # The largest logit so far, where it stood first, and the sum of the exponentials relative to it.
        largest = float("-inf")
        where = 0
        total = 0.0
        for start in range(0, columns, BLOCK):
            x = tl.load(logits + start + offsets, mask=start + offsets < columns, other=float("-inf")).to(tl.float32)
            here = tl.max(x, 0)
            if here > largest:
                where = start + tl.argmax(x, 0)
                total *= tl.exp(largest - here)
                largest = here
            total += tl.sum(tl.exp(x - largest), 0)
        normaliser = largest + tl.log(total)
        at_label = tl.load(logits + label).to(tl.float32)
        tl.store(each + row, normaliser - at_label)
        tl.store(each + n + row, normaliser * normaliser)
        tl.store(each + 2 * n + row, tl.where(where == label, 1.0, 0.0))
        if DIFFERENTIABLE:
            tl.debug_barrier()  # the label's logit is read before it is overwritten
            factor = weight * (1 + 2 * z_weight * normaliser)
            for start in range(0, columns, BLOCK):
                inside = start + offsets < columns
                x = tl.load(logits + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - normaliser) * factor - tl.where(start + offsets == label, weight, 0.0)
                tl.store(logits + start + offsets, gradient, mask=inside)
    else:
        tl.store(each + row, 0.0)
        tl.store(each + n + row, 0.0)
        tl.store(each + 2 * n + row, 0.0)
        if DIFFERENTIABLE:
            for start in range(0, columns, BLOCK):
                tl.store(logits + start + offsets, tl.zeros([BLOCK], tl.float32), mask=start + offsets < columns)
