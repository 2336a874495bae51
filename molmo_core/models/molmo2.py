"""Molmo2: text, an image, several images or a video in, text out, in one model.

Its network is Molmo's: what differs are the layout of the tokens, attention among image tokens in both directions, per-frame tokens,
and settings of the language model (q/k norms, YaRN on some layers), all of them configuration.
"""

from __future__ import annotations

from molmo_core.model_configs.molmo2 import Molmo2Config
from molmo_core.models.molmo import Molmo


class Molmo2(Molmo):
    """Molmo with Molmo2's token layout; images and frames alike are `images` with `pooled_patches_idx` (k = 4 or 9)."""

    config: Molmo2Config
