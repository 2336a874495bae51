"""HeMolmo's inputs: a low-resolution view of the image, the high-resolution candidates, and room for the K that will be chosen.

Source: the published HeMolmo research code. The question stands first, then

    <im_start> (<im_low>·w_low <im_col>)·h_low <im_end>   <im_start> <im_patch>·K <im_col>·h <im_end>

and the answer. Which candidate fills which `<im_patch>` is the model's choice, so these tokens share one position, to which the
model adds the place of the candidate in the high-resolution grid (`high_res_pos_ids`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from molmo_core.preprocessing.configs import HePreprocessorConfig
from molmo_core.preprocessing.image_tokens import grid_tokens
from molmo_core.preprocessing.images import ImageFeatures, preprocess_image
from molmo_core.preprocessing.messages import MediaTokens
from molmo_core.preprocessing.preprocessor import MolmoPreprocessor
from molmo_core.preprocessing.tiling import Grid, ImageSettings, pool_patches, pooled_grid, raster_grid, raster_patches, single_crop_pooling


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
        self, images: Sequence[np.ndarray], rng: np.random.RandomState
    ) -> tuple[list[MediaTokens], dict[str, np.ndarray | None]]:
        """Tokens and arrays of the image.

        Returns:
            the tokens, and `images` uint8 [crops, patches, p·p·3], `image_masks` [crops, patches] (encoders that pad),
            `low_res_tokens_idx` int64 [n_low, k], `high_res_tokens_idx` int64 [N, k], `high_res_pos_ids` int64 [N],
            `high_res_features_weights` float32 [K] of ones, `low_to_high` float32 [n_low·f·f, N].
        """
        if not images:
            return [], {}
        if len(images) > 1 or self.settings is None:
            raise ValueError(
                f"HeMolmo takes one image an example, got {len(images)}" + (" and no vision_backbone" * (self.settings is None))
            )
        features = preprocess_image(images[0], self.settings)
        low_grid, low_idx = low_res_view(features, self.config, self.settings)
        height, width = features.grids[-1]
        candidates = height * width
        k = self.config.num_high_res_features or math.ceil(self.selection_ratio * candidates)
        tokenizer = self.tokenizer
        start, end, col = tokenizer.image_start_token_id, tokenizer.image_end_token_id, tokenizer.image_col_token_id
        low = grid_tokens(low_grid, tokenizer.image_low_token_id, start, end, col if self.config.use_col_tokens else None)
        row, column = np.divmod(np.arange(candidates), width)
        if self.col_tokens:
            grid_positions = row * (width + 1) + column
            tail = np.append(np.arange(1, height + 1) * (width + 1), height * width + width + 1)
        else:
            grid_positions = np.arange(candidates)
            tail = np.array([k + 1])
        ids = np.concatenate([low, [start], np.full(k, tokenizer.image_patch_token_id), np.full(len(tail) - 1, col), [end]])
        positions = np.concatenate([np.arange(len(low)), len(low) + np.concatenate([[0], np.ones(k, np.int64), tail])])
        arrays = {
            "images": features.images,
            "image_masks": features.image_masks,
            "low_res_tokens_idx": low_idx,
            "high_res_tokens_idx": features.pooled_patches_idx[-candidates:],
            "high_res_pos_ids": grid_positions.astype(np.int64),
            "high_res_features_weights": np.ones(k, np.float32),
            "low_to_high": interpolation(low_grid, (height, width), self.interpolation_factor),
        }
        return [MediaTokens(ids, positions)], arrays


def low_res_view(features: ImageFeatures, config: HePreprocessorConfig, settings: ImageSettings) -> tuple[Grid, np.ndarray]:
    """Grid of the low-resolution tokens and the patches each reads, int64 [n_low, k]."""
    if config.low_res_from_high is None:
        pooling = (config.low_res_from_low or 2,) * 2
        return pooled_grid(settings.crop_grid, pooling), single_crop_pooling(settings, pooling)
    if features.tiling is None:
        raise ValueError("low_res_from_high needs high-resolution crops: crop_mode='overlap-and-resize-c2'")
    pooling = (config.low_res_from_high,) * 2
    patches = raster_patches(features.tiling, settings) + settings.patches_per_crop
    return pooled_grid(raster_grid(features.tiling, settings), pooling), pool_patches(patches, pooling)


def interpolation(low: Grid, high: Grid, factor: int) -> np.ndarray:
    """How the score cells of the low-resolution tokens spread over the candidates: bilinear, half-pixel centres, no antialiasing.

    Args:
        low: rows and columns of low-resolution tokens, each with factor x factor score cells.
        high: rows and columns of candidates.

    Returns:
        float32 [rows·columns·factor·factor of `low`, rows·columns of `high`]; rows in the order token row, token column, cell row,
        cell column. Every column sums to 1.
    """

    def axis(size: int, out: int) -> np.ndarray:
        """Weights [out, size] of linear interpolation."""
        position = np.clip((np.arange(out) + 0.5) * (size / out) - 0.5, 0, size - 1)
        lower = np.floor(position).astype(np.int64)
        upper = np.minimum(lower + 1, size - 1)
        weights = np.zeros((out, size), np.float64)
        np.add.at(weights, (np.arange(out), lower), 1 - (position - lower))
        np.add.at(weights, (np.arange(out), upper), position - lower)
        return weights

    rows, cols = axis(low[0] * factor, high[0]), axis(low[1] * factor, high[1])
    full = np.einsum("yi,xj->ijyx", rows, cols)
    split = full.reshape(low[0], factor, low[1], factor, high[0] * high[1]).swapaxes(1, 2)
    return split.reshape(-1, high[0] * high[1]).astype(np.float32)
