"""The tokens that stand for an image in the sequence, and how many there will be (from the size in its header alone)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from molmo_core.preprocessing.tiling import Grid, ImageSettings, image_tiling, token_grids


class ImageTokenizer(Protocol):
    """What images need of a `Tokenizer`: the ids of the tokens that stand for them."""

    image_start_token_id: int
    image_end_token_id: int
    image_patch_token_id: int
    image_col_token_id: int
    image_low_token_id: int
    low_res_image_start_token_id: int | None


def grid_tokens(grid: Grid, patch: int, start: int | None = None, end: int | None = None, col: int | None = None) -> np.ndarray:
    """A grid of pooled tokens: start, then for every row its patch tokens (and a column token), then end.

    Args:
        grid: rows and columns of pooled tokens.
        patch, start, end, col: token ids; None leaves that token out.

    Returns:
        int64 [tokens].
    """
    rows = np.full((grid[0], grid[1] + (col is not None)), patch, np.int64)
    if col is not None:
        rows[:, -1] = col
    return np.concatenate([[] if start is None else [start], rows.ravel(), [] if end is None else [end]]).astype(np.int64)


def image_tokens(grids: Sequence[Grid], ids: ImageTokenizer, settings: ImageSettings) -> np.ndarray:
    """The tokens of one image.

    Args:
        grids: `ImageFeatures.grids` (or `token_grids`): the global crop, then the high-resolution grid if there is one.
        ids: the tokenizer.
        settings: decides the layout (column tokens, start token of the global crop).

    Returns:
        int64 [tokens]; as many `image_patch_token_id` (and `image_low_token_id`) as the image has pooled tokens.
    """
    col = ids.image_col_token_id
    parts = []
    for i, grid in enumerate(grids):
        is_global = i == 0
        start = ids.image_start_token_id
        if is_global and settings.use_single_crop_start_token:
            if ids.low_res_image_start_token_id is None:
                raise ValueError("this tokenizer has no start token for the global crop; set use_single_crop_start_token=false")
            start = ids.low_res_image_start_token_id
        with_cols = settings.use_col_tokens and (settings.use_single_crop_col_tokens or not is_global)
        patch = ids.image_low_token_id if is_global and settings.low_tokens_global_crop else ids.image_patch_token_id
        parts.append(grid_tokens(grid, patch, start, ids.image_end_token_id, col if with_cols else None))
    return np.concatenate(parts)


def image_token_counts(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """How many tokens and crops an image of `height` x `width` pixels (after EXIF rotation) will take.

    Returns:
        tokens (start, end and column tokens included), crops (the global crop included).
    """
    tiling = image_tiling(height, width, settings)
    tokens = 0
    for i, (rows, cols) in enumerate(token_grids(tiling, settings)):
        with_cols = settings.use_col_tokens and (settings.use_single_crop_col_tokens or i > 0)
        tokens += rows * (cols + with_cols) + 2
    return tokens, 1 + (tiling.rows * tiling.cols if tiling else 0)
