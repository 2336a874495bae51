"""The training loss: weighted cross entropy of the next token, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class LossSums(NamedTuple):
    """Weighted sums over positions, float32 scalars. Only `total` has a gradient."""

    total: torch.Tensor
    """`cross_entropy` + z_weight · `z`: what is minimised."""
    cross_entropy: torch.Tensor
    z: torch.Tensor
    """Σ w · logsumexp(logits)²."""
    correct: torch.Tensor
    """Σ w · [the most probable token is the label]."""


class Rows(NamedTuple):
    """Of every position: its unweighted parts of the sums, float32 [n]."""

    cross_entropy: torch.Tensor
    z: torch.Tensor
    correct: torch.Tensor


def loss_weights(labels: torch.Tensor, loss_masks: torch.Tensor | None) -> torch.Tensor:
    """float32 weights of the positions: `loss_masks` (or 1) where there is a label, 0 elsewhere. Padding weights (-1) count as 0."""
    weights = torch.ones_like(labels, dtype=torch.float32) if loss_masks is None else loss_masks.float().clamp(min=0)
    return torch.where(labels >= 0, weights, 0.0)


def loss_positions(labels: torch.Tensor, loss_masks: torch.Tensor | None) -> torch.Tensor:
    """int64 [n], n >= 1: the positions with a weight among all [B · S]; the first one if none has any. For tensors of the host: their
    number decides a shape, which a GPU would have to be asked for."""
    chosen = loss_weights(labels, loss_masks).flatten().nonzero()[:, 0]
    return chosen if len(chosen) else torch.zeros(1, dtype=torch.int64)


def loss_sums(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_weight: float = 0.0) -> LossSums:
    """logits [N, E], labels int64 [N], weights float32 [N]; positions of weight 0 are left out, whatever their label."""
    logits = logits.float()
    targets = torch.where(weights > 0, labels, -100)
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    z = torch.where(weights > 0, logits.logsumexp(-1).square(), 0.0)
    correct = (logits.detach().argmax(-1) == targets).float()
    total = (weights * (losses + z_weight * z)).sum()
    return LossSums(total, *((weights * part).sum().detach() for part in (losses, z, correct)))


def chunked_loss_sums(
    hidden: torch.Tensor,
    matrices: Sequence[torch.Tensor],
    labels: torch.Tensor,
    weights: torch.Tensor,
    z_weight: float = 0.0,
    scale: float = 1.0,
    chunk: int = 2048,
) -> LossSums:
    """The same sums of the logits `scale` · hidden @ cat(matrices).T, which are never held but for `chunk` positions.

    The gradients of hidden state and matrices are computed with the loss, so that no product is done twice.

    Args:
        hidden: [n, d].
        matrices: of the output layer, [rows, d] each.
        labels: int64 [n]; an index of all rows where there is a weight.
        weights: float32 [n].
        z_weight: of the z-loss in `total`.
        scale: of the logits.
        chunk: positions at a time.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, matrices = hidden.to(dtype), [m.to(dtype) for m in matrices]
    sums = _LinearCrossEntropy.apply(hidden, labels, weights, z_weight, scale, chunk, torch.is_grad_enabled(), *matrices)
    return LossSums(*sums)


class _LinearCrossEntropy(torch.autograd.Function):
    """`chunked_loss_sums`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        z_weight: float,
        scale: float,
        chunk: int,
        differentiable: bool,
        *matrices: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        needs = [differentiable and needed for needed in (ctx.needs_input_grad[0], *ctx.needs_input_grad[7:])]
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_matrices = [torch.empty_like(m) if needed else None for m, needed in zip(matrices, needs[1:])]
        rows: list[Rows] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                x = hidden[part]
                logits = x @ matrices[0].T if len(matrices) == 1 else torch.cat([x @ m.T for m in matrices], -1)
                if scale != 1.0:
                    logits = logits * scale
                found, gradient = _rows(logits, labels[part], weights[part], z_weight, any(needs))
                rows.append(found)
                if gradient is None:
                    continue
                if scale != 1.0:
                    gradient = gradient * scale
                pieces = gradient.split([len(m) for m in matrices], -1)
                if d_hidden is not None:
                    torch.mm(pieces[0], matrices[0], out=d_hidden[part])
                    for piece, matrix in zip(pieces[1:], matrices[1:]):
                        d_hidden[part] += piece @ matrix
                for d_matrix, piece in zip(d_matrices, pieces):
                    if d_matrix is not None:
                        torch.addmm(d_matrix, piece.T, x, beta=int(start > 0), out=d_matrix)
            sums = [(weights * torch.cat(parts)).sum() for parts in zip(*rows)]
        ctx.save_for_backward(d_hidden, *d_matrices)
        ctx.spent = False
        ctx.mark_non_differentiable(*sums)
        return sums[0] + z_weight * sums[1], *sums

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> Any:  # type: ignore[override]
        if ctx.spent:
            raise RuntimeError("the loss of chunks goes backward once: its gradients are scaled where they lie")
        ctx.spent = True
        d_hidden, *d_matrices = (None if d is None else d.mul_(upstream) for d in ctx.saved_tensors)
        return d_hidden, None, None, None, None, None, None, *d_matrices


def _rows(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_weight: float, differentiable: bool
) -> tuple[Rows, torch.Tensor | None]:
    """Cross entropy, squared log-normaliser and correctness of every row of logits [n, E], and, if asked for, the gradient of
    Σ w · (cross entropy + z_weight · z) in the dtype of the logits; positions of weight 0 count as 0."""
    if logits.is_cuda:
        from molmo_core.nn.loss_kernel import rows  # Triton is there with a GPU only

        found, gradient = rows(logits, labels, weights, z_weight, differentiable)
        return Rows(*found), gradient
    kept = weights > 0
    labels, x = torch.where(kept, labels, 0), logits.float()
    normaliser = x.logsumexp(-1)
    each = Rows(normaliser - x.gather(1, labels[:, None])[:, 0], normaliser.square(), (x.argmax(-1) == labels).float())
    each = Rows(*(torch.where(kept, part, 0.0) for part in each))
    if not differentiable:
        return each, None
    gradient = (x - normaliser[:, None]).exp_().mul_((weights * (1 + 2 * z_weight * normaliser))[:, None])
    gradient.scatter_add_(1, labels[:, None], -weights[:, None])
    return each, gradient.to(logits.dtype)
