"""Settings of pointing by selection (`molmo_core.nn.pointing`). Names are those of the published configurations."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from molmo_core.config import BaseConfig, Positive

When = Literal["never", "always", "inference"]


@dataclasses.dataclass
class PointConfig(BaseConfig):
    """How a point is chosen among image tokens, patches of a token and cells of a patch. The defaults are those of the released models."""

    shared_low_high_embedding: bool = True
    """Tokens of the global crop share the embedding of the high-resolution ones."""
    patch_location: Literal["3x3"] | None = "3x3"
    """Cells of a patch; None: points are patches."""
    no_more_points_class: bool = True
    """A learned candidate beside the image tokens that ends a list of points."""
    patch_embed_dim: Annotated[int, Field(ge=2, le=1 << 20, multiple_of=2)] = 512
    """e: width of queries and keys."""
    patch_embedding_kind: Literal["linear", "image_feature0"] = "image_feature0"
    """Added to the embedding of a selected token: its image feature, or a projection of all its patches."""
    embed_selected_vit_patch: Literal["linear", "linear_with_pos"] | None = "linear"
    """Added to the embedding of a selected patch: a projection of its features, with an embedding of its place in the token."""
    embed_location: bool = False
    """An embedding for each cell."""
    layer_norm_x: bool = True
    """RMSNorm before the heads."""
    norm_x: bool = True
    """Without that norm: divide by sqrt(d)."""
    norm_logits: bool = True
    """Divide by the square root of the number of candidate tokens, and of e for patches."""
    mask_patches: When = "always"
    """A point does not come before the one before it (in the order of image tokens)."""
    mask_subpatches: When = "inference"
    """Patches that a token lacks (at the border of a grid) are no candidates."""
    mask_repeats: Literal["never", "inference"] = "inference"
    """No patch twice."""
    sort_points: bool = True
    """Points of a record in the order of image tokens; otherwise shuffled (then `mask_patches` must be `never`)."""
    token_prediction_rotary: Literal["none", "one_d"] = "one_d"
    """Rotate keys by the number of the image token, queries by that of the last point."""
    token_prediction_rotary_theta: Positive | None = 50_000.0
    """None: `llm.rope_theta`."""
    weigh_point_losses: bool = False
    """Weigh each point's losses like the text around it (message weights, trees); published: every point counts 1."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"token_prediction_rotary_dims": (None,), "debug": (None,)}

    @property
    def cells(self) -> int:
        """Cells of a patch (0: points have none)."""
        return 0 if self.patch_location is None else 9
