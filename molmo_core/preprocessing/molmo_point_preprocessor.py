"""MolmoPoint's inputs: Molmo2's, with tokens of their own for global crops, and points as tokens.

Beside the arrays of Molmo2 an example with points has `point_target_ids` int64 [n, 3]: what their tokens stand for (`point_places`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from molmo_core.preprocessing.configs import MolmoPointPreprocessorConfig
from molmo_core.preprocessing.molmo2_preprocessor import Molmo2Preprocessor
from molmo_core.preprocessing.point_places import PointPlaces
from molmo_core.preprocessing.tiling import ImageSettings


@dataclasses.dataclass
class MolmoPointPreprocessor(Molmo2Preprocessor):
    """Text with no, one or several images, or with a video, and what can be pointed at in them."""

    config: MolmoPointPreprocessorConfig = dataclasses.field(default_factory=MolmoPointPreprocessorConfig)
    frame_tokens: ClassVar[bool] = True

    def image_places(self, sizes: Sequence[tuple[int, int]], settings: ImageSettings | None) -> PointPlaces | None:
        if settings is None or settings.crop_mode == "resize":  # without crops nothing can be pointed at
            return None
        return PointPlaces.of_images(sizes, settings)

    def frame_places(self, times: np.ndarray) -> PointPlaces | None:
        assert self.settings is not None
        return PointPlaces.of_frames(times, self.settings, (self.config.video_pooling_h, self.config.video_pooling_w))
