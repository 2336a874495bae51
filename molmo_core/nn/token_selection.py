"""Token scoring and selection of HeMolmo: which high-resolution image tokens are worth the language model's time.

Source: the published HeMolmo research code. A first, cheap pass of the language model over the question and a
low-resolution image gives every low-resolution token a feature; from these every high-resolution *candidate* gets a
score, and the K best are kept. The choice itself has no gradient: in training the attention values of the kept
tokens are multiplied by sigmoid(score), which is how the scorer learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from molmo_core.nn.norm import RMSNorm
from molmo_core.nn.selection_configs import TokenScorerConfig, TokenSelectionConfig

SCORER_WIDTH = 1024
"""Hidden width of the scorer's MLPs (fixed in the published code)."""


class Selection(NamedTuple):
    """The chosen candidates of each example, best first."""

    indices: torch.Tensor
    """int64 [B, K] into the candidates."""
    valid: torch.Tensor
    """bool [B, K]; false where an example has fewer than K candidates, or a smaller K."""
    importance: torch.Tensor | None
    """[B, K] in (0, 1]: factor on the attention values; None = unscaled (inference)."""
    loss: torch.Tensor | None
    """Scalar, already weighted; only in training."""
    metrics: dict[str, torch.Tensor]


class ScoreMlp(nn.Module):
    """SwiGLU head: w1 [2*1024, in] (value, gate), w2 [out, 1024] with bias."""

    def __init__(self, width: int, outputs: int, normalize: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, 2 * SCORER_WIDTH, bias=False)
        self.w2 = nn.Linear(SCORER_WIDTH, outputs)
        self.scale = SCORER_WIDTH**-0.5 if normalize else 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., outputs]."""
        value, gate = self.w1(x).chunk(2, dim=-1)
        return self.w2(value * F.silu(gate)) * self.scale


class TokenScoring(nn.Module):
    """The scorer's layers, mixed into a model so that they keep their published top-level parameter names."""

    scorer_config: TokenScorerConfig
    SCORER_LAYERS: ClassVar[tuple[str, ...]] = (
        "importance_norm", "importance_ln", "patch_importance_norm", "patch_importance_ln", "image_query_ln", "rescale",
    )  # fmt: skip

    def build_scorer(self, config: TokenScorerConfig, d_model: int, n_layers: int, eps: float) -> None:
        """Adds the layers that `config` asks for.

        Args:
            config: see `TokenScorerConfig`.
            d_model: width of the language model.
            n_layers: blocks of the first pass; the head reads all their outputs, n_layers * d_model values a token.
            eps: of the RMSNorms.
        """
        self.scorer_config = config
        normalize, width = config.normalize_importance_scores, n_layers * d_model
        cells = config.low_to_high_interpolation_factor**2
        if config.selection_model in ("linear", "mlp"):
            if config.importance_norm:
                self.importance_norm = RMSNorm(width, eps)
            linear = config.selection_model == "linear"
            self.importance_ln = nn.Linear(width, cells, bias=False) if linear else ScoreMlp(width, cells, normalize)
        if config.selection_model == "prior_only" or (config.high_res_patch_prior and config.selection_model != "random"):
            if config.importance_norm:
                self.patch_importance_norm = RMSNorm(d_model, eps)
            self.patch_importance_ln = ScoreMlp(d_model, 1, normalize)
        if config.vector_query:
            self.image_query_ln = nn.Linear(width, d_model + 2 * bool(config.vector_query_scaling), bias=False)
        if config.learned_rescaling:
            self.rescale = nn.Linear(1, 1)

    def reset_scorer(self) -> None:
        """Initialises the scorer: normal with standard deviation 0.02, norms 1, biases 0, rescaling the identity."""
        scorer = [child for name, child in self.named_children() if name in self.SCORER_LAYERS]
        for child in scorer:
            for layer in child.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.06, b=0.06)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
                elif isinstance(layer, RMSNorm):
                    nn.init.ones_(layer.weight)
        if hasattr(self, "rescale"):
            nn.init.ones_(self.rescale.weight)

    def score_candidates(
        self,
        hidden: Sequence[torch.Tensor],
        low_positions: torch.Tensor,
        query_position: torch.Tensor,
        high: torch.Tensor,
        high_valid: torch.Tensor,
        low_to_high: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores every candidate.

        Args:
            hidden: outputs [B, S_low, d] of the first pass' blocks.
            low_positions: int64 [B, n_low], where the low-resolution tokens stand in it; -1 = absent.
            query_position: int64 [B], the position before the low-resolution image's end token.
            high: [B, N, d], the candidates' projected features (0 where absent).
            high_valid: bool [B, N].
            low_to_high: [B, n_low*f*f, N], share of every score cell in every candidate.

        Returns:
            scores [B, N] (float32), and the scores [B, n_low, f*f] of the low-resolution cells (None without a head).
        """
        config = self.scorer_config
        low_scores, query = None, None
        scores = high.new_zeros(high.shape[:2], dtype=torch.float32)
        if config.selection_model in ("linear", "mlp") or config.vector_query:
            features = _layer_features(hidden, low_positions, 1.0 if config.normalize_importance_scores else len(hidden) ** -0.5)
        if config.selection_model in ("linear", "mlp"):
            x = self.importance_norm(features) if config.importance_norm else features
            if config.normalize_importance_scores:
                x = x * x.shape[-1] ** -0.5
            x = F.dropout(x, config.low_res_features_drop, self.training)
            low_scores = self.importance_ln(x).float()
            if not config.four_scores_per_low_res_patch:
                low_scores = low_scores.mean(-1, keepdim=True).expand_as(low_scores)
            present = (low_positions >= 0)[..., None]
            cells = torch.where(present, low_scores, 0.0).flatten(1)
            scores = torch.einsum("bc,bcn->bn", cells, low_to_high.float())
        if config.vector_query:
            scale = 1.0 if config.normalize_importance_scores else len(hidden) ** -0.5
            query = self.image_query_ln(_layer_features(hidden, query_position[:, None], scale)[:, 0])
            d = high.shape[-1]
            scores = scores + torch.einsum("bd,bnd->bn", query[:, :d], high).float() * d**-0.5
            if config.vector_query_scaling:
                factor, bias = (query[:, d:].float() * d**-0.5).unbind(-1)
                scores = scores * factor[:, None] + bias[:, None]
        if hasattr(self, "patch_importance_ln"):
            prior = high if config.bp_patch_prior else high.detach()
            if config.importance_norm:
                prior = self.patch_importance_norm(prior)
            prior = F.dropout(prior, config.high_res_patch_prior_drop, self.training)
            scores = scores + self.patch_importance_ln(prior)[..., 0].float()
        if config.selection_model == "random":
            scores = torch.randint(0, 10_000, scores.shape, device=scores.device).float()
        if config.learned_rescaling == "norm-with-bias":
            count = high_valid.sum(-1, keepdim=True).clamp(min=1)
            scores = scores - torch.where(high_valid, scores, 0.0).sum(-1, keepdim=True) / count
        if config.learned_rescaling:
            scores = self.rescale(scores[..., None].to(self.rescale.weight.dtype))[..., 0].float()
        return scores, low_scores


def select_tokens(
    config: TokenSelectionConfig,
    scores: torch.Tensor,
    candidate_valid: torch.Tensor,
    slots: torch.Tensor,
    training: bool,
    scaled: bool = True,
) -> Selection:
    """Takes the best candidates of each example.

    Args:
        config: see `TokenSelectionConfig`.
        scores: float32 [B, N].
        candidate_valid: bool [B, N].
        slots: float [B, K], 1 for each token the example has room for, then 0.
        training: scale and compute the loss.
        scaled: false for scores without meaning (random selection): no scaling, no loss.
    """
    lowest = torch.finfo(torch.bfloat16).min
    scores = torch.where(candidate_valid, scores / config.rescale + config.offset, lowest)
    k = slots.shape[1]
    if scores.shape[1] < k:
        scores = F.pad(scores, (0, k - scores.shape[1]), value=lowest)
    values, indices = scores.topk(k, dim=1)
    valid = (values > lowest) & (slots > 0)
    if not scaled or not (training or config.scale_at_test):
        return Selection(indices, valid, None, None, {})
    importance = values.sigmoid()
    used = valid
    if training and config.dropout:
        dropped = torch.rand_like(importance) < config.dropout
        importance, used = importance.masked_fill(dropped, 1.0), valid & ~dropped
    statistics = {name: value.detach() for name, value in _statistics(values, importance, used, candidate_valid, slots).items()}
    loss = _selection_loss(config, values, importance, used) if training else None
    return Selection(indices, valid, torch.where(valid, importance, 1.0), loss, statistics)


def _layer_features(hidden: Sequence[torch.Tensor], positions: torch.Tensor, scale: float) -> torch.Tensor:
    """All layers' outputs at `positions` [B, n], joined: [B, n, layers*d]."""
    index = positions.clamp(min=0)[..., None].expand(-1, -1, hidden[0].shape[-1])
    return torch.cat([h.gather(1, index) for h in hidden], dim=-1) * scale


def _mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Mean of the values where `mask` (0 where there is none)."""
    if dim is None:
        return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
    return torch.where(mask, values, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)


def _selection_loss(config: TokenSelectionConfig, values: torch.Tensor, importance: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    if config.loss == "batch-mean":
        loss = (_mean(importance, used) - config.target_scale).abs() ** config.loss_pow
        loss = loss * used.any()
    else:
        distance = (_mean(importance, used, 1) - config.target_scale).abs()
        if config.loss == "example-mean":
            loss = _mean(distance**config.loss_pow, used.any(1))
        else:
            loss = _mean(distance, used.any(1)) ** config.loss_pow
    loss = config.loss_weight * loss
    if config.saturation_loss:
        loss = loss + config.saturation_loss * _mean(F.relu(values.abs() - 10) ** 2, used)
    return loss


def _statistics(
    values: torch.Tensor, importance: torch.Tensor, used: torch.Tensor, candidates: torch.Tensor, slots: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What training curves need: spread of the scales, share of candidates taken, their raw scores."""
    mean = _mean(importance, used)
    return {
        "TokenScaleMean": mean,
        "TokenScaleVar": _mean((importance - mean) ** 2, used),
        "TokenScale80": _mean((importance > 0.8).float(), used),
        "TokenScale20": _mean((importance < 0.2).float(), used),
        "HighResSelection": used.sum() / candidates.sum().clamp(min=1),
        "HighResVals": _mean(values, used),
    }
