"""Mixture of experts of MolmoE: dropless top-k routing over gated experts.

Parameter names and layout are those of the published training checkpoints: the matrices of all experts stacked along the rows,
`w1` (gate) and `v1` (up) as [experts·I, d], `w2` (down) transposed, also [experts·I, d].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from molmo_core.nn.configs import LlmConfig


class RouterLosses(NamedTuple):
    """Auxiliary losses of one layer over its real tokens, unweighted float32 scalars."""

    load_balancing: torch.Tensor
    """experts · Σ_e (share of assignments to e) · (mean probability of e); 1 when the load is even."""
    z: torch.Tensor
    """mean over tokens of logsumexp(router logits)²."""


class Router(nn.Module):
    """Scores of every expert for every token."""

    def __init__(self, size: int, experts: int):
        super().__init__()
        self.layer = nn.Linear(size, experts, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class ExpertMlp(nn.Module):
    """The stacked matrices of all experts; computes silu(x W1) · (x V1) W2 for rows sorted by expert."""

    def __init__(self, size: int, hidden: int, experts: int):
        super().__init__()
        self.experts = experts
        self.w1 = nn.Parameter(torch.empty(experts * hidden, size))
        self.v1 = nn.Parameter(torch.empty(experts * hidden, size))
        self.w2 = nn.Parameter(torch.empty(experts * hidden, size))

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x [T, d] sorted by expert, counts int64 [experts] rows of each; returns [T, d]."""
        w1, v1, w2 = (w.unflatten(0, (self.experts, -1)) for w in (self.w1, self.v1, self.w2))
        if torch.is_autocast_enabled(x.device.type):  # the grouped product is not on autocast's list
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w1, v1, w2 = (t.to(dtype) for t in (x, w1, v1, w2))
        if x.is_cuda and x.dtype == torch.bfloat16:
            ends = counts.cumsum(0).to(torch.int32)
            hidden = F.silu(torch._grouped_mm(x, w1.mT, ends)) * torch._grouped_mm(x, v1.mT, ends)
            return torch._grouped_mm(hidden, w2, ends)
        rows = x.split(counts.tolist())
        return torch.cat([(F.silu(r @ w1[e].mT) * (r @ v1[e].mT)) @ w2[e] for e, r in enumerate(rows)])


class Experts(nn.Module):
    """Level of the published parameter names (`ffn.experts.mlp.*`)."""

    def __init__(self, size: int, hidden: int, experts: int):
        super().__init__()
        self.mlp = ExpertMlp(size, hidden, experts)


class MixtureOfExperts(nn.Module):
    """Each token goes to its `moe_top_k` most probable experts; their outputs are added with the probabilities as they are.

    The probabilities are a float32 softmax over all experts and are not renormalised over the chosen ones. No token is dropped.
    """

    def __init__(self, config: LlmConfig):
        super().__init__()
        self.top_k = config.moe_top_k
        self.router = Router(config.d_model, config.moe_num_experts)
        self.experts = Experts(config.d_model, config.intermediate_size, config.moe_num_experts)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, RouterLosses | None]:
        """x [B, S, d], real tokens bool [B, S] (None: all) -> output [B, S, d], router losses (None where no gradient is wanted)."""
        tokens = x.flatten(0, -2)
        logits = self.router(tokens)
        probabilities = F.softmax(logits, dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        assigned = F.one_hot(chosen, probabilities.shape[-1]).sum(1)
        rows = order // self.top_k
        outputs = self.experts.mlp(tokens[rows], assigned.sum(0))
        outputs = outputs * weights.flatten()[order, None].to(outputs.dtype)
        result = torch.zeros_like(tokens, dtype=outputs.dtype).index_add(0, rows, outputs)
        losses = _router_losses(logits, probabilities, assigned, valid) if torch.is_grad_enabled() else None
        return result.to(x.dtype).view_as(x), losses


def _router_losses(logits: torch.Tensor, probabilities: torch.Tensor, assigned: torch.Tensor, valid: torch.Tensor | None) -> RouterLosses:
    """From logits, probabilities and 0/1 assignments [T, experts] of all tokens."""
    weight = torch.ones_like(probabilities[:, :1]) if valid is None else valid.reshape(-1, 1).to(probabilities.dtype)
    weight = weight / weight.sum().clamp_min(1)
    share = (weight * assigned).sum(0) / assigned[0].sum()
    balance = probabilities.shape[-1] * (share * (weight * probabilities).sum(0)).sum()
    return RouterLosses(balance, (weight[:, 0] * logits.float().logsumexp(-1).square()).sum())
