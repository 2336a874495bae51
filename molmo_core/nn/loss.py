"""The training loss: weighted cross entropy of the next token, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class LossSums(NamedTuple):
    """Weighted sums over positions, float32 scalars."""

    cross_entropy: torch.Tensor
    z: torch.Tensor
    """Σ w · logsumexp(logits)²."""
    correct: torch.Tensor
    """Σ w · [the most probable token is the label]."""


def loss_weights(labels: torch.Tensor, loss_masks: torch.Tensor | None) -> torch.Tensor:
    """float32 weights of the positions: `loss_masks` (or 1) where there is a label, 0 elsewhere. Padding weights (-1) count as 0."""
    weights = torch.ones_like(labels, dtype=torch.float32) if loss_masks is None else loss_masks.float().clamp(min=0)
    return torch.where(labels >= 0, weights, 0.0)


def loss_sums(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> LossSums:
    """logits [N, E], labels int64 [N], weights float32 [N]; positions of weight 0 are left out, whatever their label."""
    logits = logits.float()
    targets = torch.where(weights > 0, labels, -100)
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    z = torch.where(weights > 0, logits.logsumexp(-1).square(), 0.0)
    with torch.no_grad():
        correct = (logits.argmax(-1) == targets).float()
    return LossSums((weights * losses).sum(), (weights * z).sum(), (weights * correct).sum())


def chunked_loss_sums(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, chunk: int = 1024
) -> LossSums:
    """The same sums without ever holding all logits: only positions with weight, `chunk` at a time, recomputed in the backward pass.

    Args:
        head: hidden [n, d] -> logits [n, E].
        hidden: [N, d].
        labels: int64 [N].
        weights: float32 [N].
        chunk: positions at a time.
    """
    chosen = (weights > 0).nonzero()[:, 0]
    if not len(chosen):
        chosen = torch.zeros(1, dtype=torch.int64, device=hidden.device)  # keeps the graph whole; its weight is 0
    hidden, labels, weights = hidden[chosen], labels[chosen], weights[chosen]

    def piece(h: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> LossSums:
        return loss_sums(head(h), y, w)

    total = LossSums(*(torch.zeros((), device=hidden.device) for _ in LossSums._fields))
    for h, y, w in zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk)):
        part = checkpoint(piece, h, y, w, use_reentrant=False) if torch.is_grad_enabled() else piece(h, y, w)
        total = LossSums(*(a + b for a, b in zip(total, part)))
    return total
