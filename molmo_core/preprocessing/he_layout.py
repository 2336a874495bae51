"""Where HeMolmo's image tokens stand and which patches they read. Shapes only: no pixel is touched here.

Source: the published HeMolmo research code. The question comes first, then

    <im_start> (<im_low>·w_low <im_col>)·h_low <im_end>   <im_start> <im_patch>·K <im_col>·h <im_end>

and the answer. Which candidate fills which `<im_patch>` is the model's choice, so these tokens share one position, to which the
model adds the place of the candidate in the high-resolution grid (`high_res_pos_ids`).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

from molmo_core.preprocessing.configs import HePreprocessorConfig
from molmo_core.preprocessing.image_tokens import grid_tokens
from molmo_core.preprocessing.tiling import (
    Grid,
    ImageSettings,
    Tiling,
    pool_patches,
    pooled_grid,
    pooled_patches,
    raster_grid,
    raster_patches,
    single_crop_pooling,
    token_grids,
)


class HeTokenIds(Protocol):
    """The special ids of a `Tokenizer` that HeMolmo's images need."""

    image_start_token_id: int
    image_end_token_id: int
    image_patch_token_id: int
    image_col_token_id: int
    image_low_token_id: int


class HeLayout(NamedTuple):
    """One image in HeMolmo's sequence."""

    ids: np.ndarray
    """int64 [n]."""
    positions: np.ndarray
    """int64 [n], relative to the first token."""
    arrays: dict[str, np.ndarray]
    """`low_res_tokens_idx` int64 [n_low, k], `high_res_tokens_idx` int64 [N, k], `high_res_pos_ids` int64 [N],
    `high_res_features_weights` float32 [K] of ones, `low_to_high` float32 [n_low·f·f, N]."""


def he_layout(
    tiling: Tiling | None,
    settings: ImageSettings,
    config: HePreprocessorConfig,
    ids: HeTokenIds,
    selection_ratio: float,
    interpolation_factor: int,
    col_tokens: bool,
) -> HeLayout:
    """Tokens, positions and indices of an image.

    Args:
        tiling: its high-resolution crops (`image_tiling`); None = the global crop only.
        settings: with the pooling of the candidates.
        ids: the tokenizer.
        selection_ratio: K = ceil(selection_ratio · candidates), unless the configuration names K.
        interpolation_factor: score cells per low-resolution token and axis.
        col_tokens: whether the high-resolution part has a column token for every row of candidates.
    """
    low_grid, low_idx = low_res_view(tiling, settings, config)
    height, width = token_grids(tiling, settings)[-1]
    candidates = height * width
    k = config.num_high_res_features or math.ceil(selection_ratio * candidates)
    start, end, col = ids.image_start_token_id, ids.image_end_token_id, ids.image_col_token_id
    low = grid_tokens(low_grid, ids.image_low_token_id, start, end, col if config.use_col_tokens else None)
    row, column = np.divmod(np.arange(candidates), width)
    if col_tokens:
        places = row * (width + 1) + column
        tail = np.append(np.arange(1, height + 1) * (width + 1), height * width + width + 1)
    else:
        places = np.arange(candidates)
        tail = np.array([k + 1])
    tokens = np.concatenate([low, [start], np.full(k, ids.image_patch_token_id), np.full(len(tail) - 1, col), [end]])
    positions = np.concatenate([np.arange(len(low)), len(low) + np.concatenate([[0], np.ones(k, np.int64), tail])])
    arrays = {
        "low_res_tokens_idx": low_idx,
        "high_res_tokens_idx": pooled_patches(tiling, settings)[-candidates:].copy(),
        "high_res_pos_ids": places.astype(np.int64),
        "high_res_features_weights": np.ones(k, np.float32),
        "low_to_high": interpolation(low_grid, (height, width), interpolation_factor),
    }
    return HeLayout(tokens.astype(np.int64), positions.astype(np.int64), arrays)


def low_res_view(tiling: Tiling | None, settings: ImageSettings, config: HePreprocessorConfig) -> tuple[Grid, np.ndarray]:
    """Grid of the low-resolution tokens and the patches each reads, int64 [n_low, k]."""
    if config.low_res_from_high is None:
        pooling = (config.low_res_from_low or 2,) * 2
        return pooled_grid(settings.crop_grid, pooling), single_crop_pooling(settings, pooling)
    if tiling is None:
        raise ValueError("low_res_from_high needs high-resolution crops: crop_mode='overlap-and-resize-c2'")
    pooling = (config.low_res_from_high,) * 2
    return pooled_grid(raster_grid(tiling, settings), pooling), pool_patches(
        raster_patches(tiling, settings) + settings.patches_per_crop, pooling
    )


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
