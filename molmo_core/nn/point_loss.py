"""The training of points: where they stand in a batch, what the heads are asked for them, and the losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from molmo_core.nn.pointing import MASKED, NOT_SELECTABLE, PointPredictor, PointSources
from molmo_core.tokens import NO_MORE_POINTS, PointTokenIds

NAMES = ("patch", "subpatch", "location")
"""The losses of tokens, patches and cells, as they are published."""


class PointTargets(NamedTuple):
    """The points of a batch: n at most in a row; those of all rows one after the other are N."""

    labels: torch.Tensor
    """int64 [B, n, 3]: image token (`NO_MORE_POINTS`: the list ends), patch of the token, cell; -1 = absent."""
    at: torch.Tensor
    """int64 [B, n]: where their first tokens stand."""
    patches: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """int64 [N] each: row, number in the row, and where the second token stands."""
    cells: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """The same of the third tokens."""

    @classmethod
    def of(cls, labels: torch.Tensor, input_ids: torch.Tensor, ids: PointTokenIds) -> PointTargets:
        """Finds the tokens of points in input_ids int64 [B, S].

        Raises:
            ValueError: a row has another number of tokens than of labels.
        """
        columns = []
        for column, token in enumerate((ids.token, ids.patch, ids.cell)):
            found, given = input_ids == token, labels[..., column] >= 0
            if not torch.equal(found.sum(1), given.sum(1)):
                row = int((found.sum(1) != given.sum(1)).nonzero()[0, 0])
                raise ValueError(
                    f"row {row}: {int(found[row].sum())} tokens {token} of points in input_ids, but {int(given[row].sum())} labels in "
                    f"column {column} of point_target_ids"
                )
            rows, numbers = given.nonzero(as_tuple=True)
            columns.append((rows, numbers, found.nonzero(as_tuple=True)[1]))
        at = torch.zeros_like(labels[..., 0])
        rows, numbers, places = columns[0]
        at[rows, numbers] = places
        return cls(labels, at, columns[1], columns[2])


class PointLogits(NamedTuple):
    """Of the points of a batch, masked as in training."""

    tokens: torch.Tensor
    """float32 [B, n, C]."""
    patches: torch.Tensor
    """float32 [N, k]."""
    cells: torch.Tensor | None
    """float32 [N, cells]."""


def point_logits(
    predictor: PointPredictor,
    hidden: torch.Tensor,
    sources: PointSources,
    targets: PointTargets,
    groups: torch.Tensor,
    examples: torch.Tensor,
) -> PointLogits:
    """What the heads say about each point of a batch, given all before it.

    Args:
        predictor: the heads.
        hidden: [B, S, d], output of the last block.
        sources: what is chosen from.
        targets: the points.
        groups: int64 [B, S], the same number for all points of one list; inside it image tokens are in order.
        examples: int64 [B, S], number of the example in the pack.
    """
    config, x = predictor.config, predictor.normed(hidden)
    batch = torch.arange(len(x), device=x.device)[:, None]
    keys = predictor.token_keys(x[batch, sources.positions], sources.numbers)
    chosen = targets.labels[..., 0]
    before = F.pad(chosen, (1, 0))[:, :-1]  # the first point of a row comes after token 0, and so does one behind a list's end
    before = torch.where((before >= 0) & (before < NO_MORE_POINTS), before, 0)
    logits = predictor.token_logits(x[batch, (targets.at - 1).clamp(min=0)], sources.numbers[batch, before], keys)
    allowed = sources.selectable[:, None, :].expand(-1, chosen.shape[1], -1)
    if config.mask_patches == "always":
        group = groups[batch, targets.at]
        continues = F.pad(group[:, 1:] == group[:, :-1], (1, 0))
        first = torch.where(continues, before, 0)
        allowed = allowed & (torch.arange(allowed.shape[-1], device=x.device) >= first[..., None])
    allowed = allowed & (sources.examples[:, None, :] == examples[batch, targets.at][..., None])
    allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]), value=True) & (chosen >= 0)[..., None]
    logits = logits.masked_fill(~allowed, NOT_SELECTABLE)

    rows, numbers, places = targets.patches
    token = chosen[rows, numbers]
    patches = predictor.patch_logits(x[rows, places - 1], predictor.subpatch_k(sources.patches[rows, token]))
    if config.mask_subpatches == "always":
        patches = patches.masked_fill(~sources.present[rows, token], MASKED)
    rows, _, places = targets.cells
    cells = predictor.subpatch_loc_k(x[rows, places - 1]).float() if config.cells else None
    return PointLogits(logits, patches, cells)


def point_losses(
    logits: PointLogits, targets: PointTargets, weights: torch.Tensor | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each of `NAMES`: the summed cross entropy, how many were right, and how many there were; float32 scalars.

    Args:
        logits, targets: of the same batch.
        weights: float [B, S] of the positions that predict the points; None: 1 each.
    """
    labels, ends = targets.labels, logits.tokens.shape[-1] - 1
    rows, numbers = (labels[..., 0] >= 0).nonzero(as_tuple=True)
    token = labels[rows, numbers, 0]
    parts = {"patch": (logits.tokens[rows, numbers], torch.where(token == NO_MORE_POINTS, ends, token), rows, targets.at[rows, numbers])}
    rows, numbers, places = targets.patches
    parts["subpatch"] = (logits.patches, labels[rows, numbers, 1], rows, places)
    if logits.cells is not None:
        rows, numbers, places = targets.cells
        parts["location"] = (logits.cells, labels[rows, numbers, 2], rows, places)
    result = {}
    for name, (values, wanted, rows, places) in parts.items():
        each = F.cross_entropy(values, wanted, reduction="none")
        weight = torch.ones_like(each) if weights is None else weights[rows, places - 1].float().clamp(min=0)
        right = (values.argmax(-1) == wanted).float()
        result[name] = ((weight * each).sum(), (weight * right).sum().detach(), weight.sum().detach())
    return result
