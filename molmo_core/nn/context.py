"""Context parallelism: the ranks of a group share each sequence.

A rank runs the blocks over its own tokens alone. What it needs of the others are their keys and values, which are gathered in every
layer; their gradients go back the same way, as sums. A sequence is cut into twice as many chunks as there are ranks, and a rank has one
from either end: under a causal mask all then have about the same number of keys to look at. Images are shared out likewise, crop by crop,
and pooled image token by pooled image token.

A rank's loss is the part of its tokens. The loss of the sequence is the sum over the group, and so are the gradients.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

from molmo_core.nn.attention import Attention, Mask, SequenceLayout, block_mask
from molmo_core.nn.connector import MolmoVisionBackbone

try:
    from torch.distributed._functional_collectives import all_gather_single_autograd
except ImportError:  # before torch 2.13
    from torch.distributed._functional_collectives import all_gather_tensor_autograd as all_gather_single_autograd


def chunk_order(length: int, ranks: int) -> torch.Tensor:
    """The positions that each rank has of a sequence, int64 [ranks, length / ranks]: chunks r and 2 · ranks - 1 - r of rank r.

    Raises:
        ValueError: `length` is not a multiple of 2 · ranks.
    """
    if length % (2 * ranks):
        raise ValueError(f"sequences of {length} tokens cannot be shared by {ranks} ranks: pad them to a multiple of {2 * ranks}")
    chunks = torch.arange(length).view(2 * ranks, -1)
    return torch.cat((chunks[:ranks], chunks[ranks:].flip(0)), 1)


class Share:
    """This rank's part of a batch of sequences of one length."""

    def __init__(self, group: dist.ProcessGroup, length: int, device: torch.device):
        self.ranks, self.rank = group.size(), group.rank()
        self.name: Any = group.group_name
        order = chunk_order(length, self.ranks).to(device)
        self.order = order.flatten()
        """Positions of gathered tokens, int64 [S]."""
        self.own = order[self.rank]
        """Positions of this rank's tokens, int64 [S / ranks]."""

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's tokens [B, S / ranks, ...] of [B, S, ...]."""
        return tokens.index_select(1, self.own)

    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """The parts of all ranks, one after the other along `dim`; backward each gets the sum of its part's gradients."""
        return gathered(part, dim, self.name)

    def attention(self, layout: SequenceLayout, rows: int, whole: Attention, implementation: Literal["sdpa", "flex"]) -> Shared:
        """Attention of this rank's tokens to all of the sequence.

        Args:
            layout: of whole sequences.
            rows: of the batch.
            whole: attention of the queries to the gathered keys (`Whole`); it is given the mask.
            implementation: of the mask.
        """
        own, order, device = self.own, self.order, self.own.device
        rule = layout.rule(own, order)
        mask: Mask
        if implementation == "flex":
            mask = block_mask(rule, rows, len(own), len(order), device)
        else:
            b, q, k = (torch.arange(n, device=device) for n in (rows, len(own), len(order)))
            mask = rule(b[:, None, None], q[:, None], k).expand(rows, -1, -1)[:, None]
        return Shared(dataclasses.replace(cast(Any, whole), mask=mask), self.name)

    def look(
        self, backbone: MolmoVisionBackbone, images: torch.Tensor, image_masks: torch.Tensor | None, *pooled_idx: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What `backbone` gives for the same arguments, each rank doing its part of the crops and of the tokens."""
        masks = None if image_masks is None else self._slice(image_masks, 0.0)
        features = self.gather(backbone.patch_features(self._slice(images, 0), masks), 1)
        pooled = backbone.pool(features, *(self._slice(idx, -1) for idx in pooled_idx))
        return [(self.gather(part, 1)[:, : idx.shape[1]], (idx >= 0).any(-1)) for (part, _), idx in zip(pooled, pooled_idx)]

    def _slice(self, values: torch.Tensor, padding: float) -> torch.Tensor:
        """This rank's equal part [B, ceil(n / ranks), ...] of [B, n, ...], padded at the end."""
        count = -(-values.shape[1] // self.ranks)
        missing = count * self.ranks - values.shape[1]
        padded = F.pad(values, (*(0, 0) * (values.ndim - 2), 0, missing), value=padding)
        return padded[:, count * self.rank : count * (self.rank + 1)]


def gathered(part: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """`Share.gather`, by the name of the group."""
    return all_gather_single_autograd(part.contiguous(), dim, group)


@dataclasses.dataclass
class Shared:
    """Attention of this rank's tokens to the keys and values of all ranks of a group."""

    whole: Attention
    """Attention to the gathered keys and values: as many as its mask has columns."""
    group: Any
    """The name of the group."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = gathered(torch.stack((k.to(v.dtype), v)), 3, self.group).unbind()
        return self.whole(layer, q, k, v)
