"""Configurations of HeMolmo's token scoring and selection (`molmo_core.nn.token_selection`)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from molmo_core.config import BaseConfig, Count, Dropout, Positive, Share, Size, Weight


@dataclasses.dataclass
class TokenScorerConfig(BaseConfig):
    """How candidates are scored. Defaults are those of the published code; the released recipes set
    `selection_model="linear"`, `normalize_importance_scores=True` and `importance_norm=True`."""

    selection_model: Literal["linear", "mlp", "prior_only", "random"] = "linear"
    """Head on the low-resolution features; `prior_only`: only the candidates' own prior; `random`: a baseline."""
    normalize_importance_scores: bool = False
    """Scale by 1/sqrt(width): the head's inputs, and the outputs of the MLPs; scores then begin small at any width."""
    four_scores_per_low_res_patch: bool = True
    """One score for each of the f x f cells under a low-resolution token; otherwise their mean for all of them."""
    low_res_features_drop: Dropout = 0.1
    bp_low_res_start: Count = 0
    bp_low_res_end: Annotated[int, Field(ge=-1, le=10_000)] = -1
    """Blocks start <= i < end of the first pass get gradients; -1 = none does."""
    bp_patch_prior: bool = False
    """Let the prior's gradient reach the vision backbone."""
    bp_low_res_embed: bool = False
    """Let the first pass' gradient reach the embeddings."""
    high_res_patch_prior: bool = True
    """Add a score computed from each candidate alone."""
    high_res_patch_prior_drop: Dropout = 0.1
    high_res_col_tokens: bool = True
    """Row separators in the high-resolution part of the sequence."""
    unconditioned: bool = False
    """Hide the question from the first pass."""
    n_low_res_layers: Size | None = None
    """Blocks of the first pass; None = all."""
    learned_rescaling: Literal["rescale-with-bias", "norm-with-bias"] | None = None
    vector_query: Literal["from_image_end_token"] | None = None
    """Add the dot product of each candidate with a query read before the low-resolution image's end token."""
    vector_query_scaling: bool | None = None
    """The query also gives a scale and a bias for all scores."""
    importance_norm: bool = False
    """RMSNorm on the head's inputs."""
    low_to_high_interpolation_factor: Annotated[int, Field(ge=1, le=1024)] = 2
    """f: score cells per low-resolution token and axis."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"source": (None, "all_layers"), "debug": (None, False), "attention_scaling": (None,)}


@dataclasses.dataclass
class TokenSelectionConfig(BaseConfig):
    """How the K best candidates are taken, and the loss that keeps their scores in range."""

    loss_weight: Weight = 0.01
    target_scale: Share = 0.7
    """Wanted mean of sigmoid(score) over the selected tokens."""
    loss_pow: Positive = 1
    loss: Literal["batch-mean", "example-mean", "loss-mean"] = "batch-mean"
    """Distance of the batch's mean from the target; of each example's, averaged; the averaged distance, then its power."""
    dropout: Share = 0.0
    """Probability that a selected token is used unscaled (and left out of the loss) in training."""
    scale_at_test: bool = False
    rescale: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    offset: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.2
    saturation_loss: Weight = 0.0
    """Weight of the penalty on |score| > 10."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"hard": (False,), "noise": (0, 0.0), "attention_scaling": (None,)}
