"""Which patches each image token reads, found out from the tokens alone: for images that come without an index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molmo_core.preprocessing.tiling import Grid, ImageSettings, pool_patches, pooled_patches, single_crop_pooling, tiling_of_token_grid
from molmo_core.tokens import ImageTokenIds


def pooled_idx(input_ids: np.ndarray, crops: int, tokens: ImageTokenIds, settings: ImageSettings) -> np.ndarray:
    """`pooled_patches_idx` rebuilt from the grids that the image tokens draw.

    An image is its global crop (one grid of tokens), then, where crops overlap, the high-resolution grid; the size of that grid
    gives the tiling, and the tiling gives the index.

    Args:
        input_ids: int64 [B, S].
        crops: crops given per row, to check against.
        tokens: ids of the layout.
        settings: crop size, overlap margins and pooling of the preprocessor.

    Returns:
        int64 [B, n, k], rows padded with -1.

    Raises:
        ValueError: the tokens are not grids that this preprocessor makes, or need another number of crops.
    """
    return _padded([_pooled_idx_of_row(row, crops, tokens, settings, b) for b, row in enumerate(input_ids.tolist())])


def frame_idx(
    input_ids: np.ndarray, frames: int, tokens: ImageTokenIds, settings: ImageSettings, high_res_pooling: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """`low_res_pooled_idx` and `high_res_pooled_idx` of video frames, from the tokens of every frame.

    Args:
        input_ids: int64 [B, S].
        frames: frames given per row, to check against.
        tokens: ids of the layout.
        settings: crop size, and pooling of low-resolution frames.
        high_res_pooling: patches of a high-resolution token: rows, columns.

    Returns:
        Both int64 [B, n, k], rows padded with -1.

    Raises:
        ValueError: a frame has another number of tokens than this preprocessor makes, or there are more frames than `frames`.
    """
    poolings = {tokens.low: settings.pooling, tokens.patch: high_res_pooling}
    rows: dict[int, list[np.ndarray]] = {tokens.low: [], tokens.patch: []}
    for row, ids in enumerate(input_ids.tolist()):
        starts = [i for i, token in enumerate(ids) if token == tokens.start]
        if len(starts) > frames:
            raise ValueError(f"row {row}: input_ids show {len(starts)} frames, images has {frames}")
        found = {kind: [np.empty((0, pooling[0] * pooling[1]), np.int64)] for kind, pooling in poolings.items()}
        for frame, start in enumerate(starts):
            inside = ids[start : ids.index(tokens.end, start)]
            kind = tokens.low if tokens.low in inside else tokens.patch
            idx = single_crop_pooling(settings, poolings[kind], frame)
            if len(idx) != inside.count(kind):
                raise ValueError(f"row {row}: frame {frame} has {inside.count(kind)} tokens, this configuration makes {len(idx)}")
            found[kind].append(idx)
        for kind, arrays in found.items():
            rows[kind].append(np.concatenate(arrays))
    return _padded(rows[tokens.low]), _padded(rows[tokens.patch])


def crop_windows(crops: int, grid: Grid, pooling: Grid = (2, 2)) -> np.ndarray:
    """The patches of every cell of every crop, cells row by row: int64 [crops·cells, k] into crops·patches, -1 = absent."""
    patches = grid[0] * grid[1]
    cells = pool_patches(np.arange(patches).reshape(grid), pooling)
    return np.concatenate([np.where(cells >= 0, cells + crop * patches, -1) for crop in range(crops)])


def _pooled_idx_of_row(ids: list[int], crops: int, tokens: ImageTokenIds, settings: ImageSettings, row: int) -> np.ndarray:
    grids = _token_grids(ids, tokens, row)
    parts: list[np.ndarray] = []
    used = 0
    per_image = 1 if settings.crop_mode == "resize" else 2
    if len(grids) % per_image:
        raise ValueError(f"row {row}: {len(grids)} grids of image tokens, an image has {per_image}; pass pooled_patches_idx")
    for first in range(0, len(grids), per_image):
        tiling = tiling_of_token_grid(grids[first + 1], settings) if per_image == 2 else None
        idx = pooled_patches(tiling, settings)
        expected = sum(h * w for h, w in grids[first : first + per_image])
        if len(idx) != expected:
            raise ValueError(
                f"row {row}: image {first // per_image} has {expected} image tokens, this preprocessor makes {len(idx)} for such a grid; "
                "pass pooled_patches_idx"
            )
        parts.append(np.where(idx >= 0, idx + used * settings.patches_per_crop, -1))
        used += 1 + (tiling.rows * tiling.cols if tiling else 0)
    if used > crops:
        raise ValueError(f"row {row}: its image tokens need {used} crops, images has {crops}")
    return np.concatenate(parts) if parts else single_crop_pooling(settings)[:0]


def _token_grids(ids: list[int], tokens: ImageTokenIds, row: int) -> list[tuple[int, int]]:
    """Rows and columns of every grid `start (patch·w col)·h end`; a grid without column tokens is square."""
    starts = {tokens.start, tokens.low_res_start, tokens.frame_start}
    ends = {tokens.end, tokens.frame_end}
    grids: list[tuple[int, int]] = []
    begin: int | None = None
    for i, token in enumerate(ids):
        if token in starts:
            begin = i
        elif token in ends and begin is not None:
            inside = ids[begin + 1 : i]
            patches = inside.count(tokens.patch) + inside.count(tokens.low)
            height = inside.count(tokens.col) or round(patches**0.5)
            if not height or patches % height:
                raise ValueError(f"row {row}: the image tokens at {begin}..{i} are not a grid ({patches} tokens in {height} rows)")
            grids.append((height, patches // height))
            begin = None
    return grids


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows [n_b, k_b] of a batch, padded with -1: [B, n, k]."""
    result = np.full((len(rows), max(len(r) for r in rows), max(r.shape[1] for r in rows)), -1, np.int64)
    for row, idx in zip(result, rows):
        row[: len(idx), : idx.shape[1]] = idx
    return result
