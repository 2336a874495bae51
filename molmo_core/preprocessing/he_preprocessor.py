"""HeMolmo's inputs: a low-resolution view of the image, the high-resolution candidates, and room for the K that will be chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from molmo_core.preprocessing.configs import HePreprocessorConfig
from molmo_core.preprocessing.he_layout import HeLayout, he_layout
from molmo_core.preprocessing.images import ImageFeatures
from molmo_core.preprocessing.messages import MediaTokens
from molmo_core.preprocessing.preprocessor import MolmoPreprocessor, image_features
from molmo_core.preprocessing.tiling import ImageSettings, Tiling, image_tiling


@dataclasses.dataclass
class HeMolmoPreprocessor(MolmoPreprocessor):
    """One question about no or one image.

    Attributes:
        selection_ratio: K = ceil(selection_ratio · candidates), unless the configuration names K.
        interpolation_factor: score cells per low-resolution token and axis.
        col_tokens: whether the high-resolution part has a column token for every row of candidates.
    """

    config: HePreprocessorConfig = dataclasses.field(default_factory=HePreprocessorConfig)  # type: ignore[assignment]
    selection_ratio: float = 0.25
    interpolation_factor: int = 2
    col_tokens: bool = True

    def image_inputs(
        self, images: Sequence[np.ndarray | ImageFeatures], settings: ImageSettings | None
    ) -> tuple[list[MediaTokens], dict[str, np.ndarray | None]]:
        """Tokens and arrays of the image: `images`, `image_masks` (encoders that pad) and those of `HeLayout`."""
        if settings is None:
            return [], {}
        features = image_features(images[0], settings)
        layout = self._layout(features.tiling, settings)
        return [MediaTokens(layout.ids, layout.positions)], {
            "images": features.images, "image_masks": features.image_masks, **layout.arrays,
        }  # fmt: skip

    def image_counts(self, sizes: Sequence[tuple[int, int]], settings: ImageSettings | None) -> list[tuple[int, int]]:
        """Tokens and crops of the image, from its height and width."""
        if settings is None:
            return []
        tiling = image_tiling(*sizes[0], settings)
        return [(len(self._layout(tiling, settings).ids), 1 + (tiling.rows * tiling.cols if tiling else 0))]

    def _layout(self, tiling: Tiling | None, settings: ImageSettings) -> HeLayout:
        ratio, factor = self.selection_ratio, self.interpolation_factor
        return he_layout(tiling, settings, self.config, self.tokenizer, ratio, factor, self.col_tokens)

    def _settings_of(self, images: int, rng: np.random.RandomState) -> ImageSettings | None:
        if not images:
            return None
        if self.settings is None:
            raise ValueError("the example has an image, but the model has no vision_backbone")
        if images > 1:
            raise ValueError(f"HeMolmo takes one image an example, got {images}")
        return self.settings
