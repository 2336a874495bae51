"""From either style of image index (or none) to features added to token embeddings."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from molmo_core.preprocessing.tiling import ImageSettings, pool_patches, pooled_patches, single_crop_pooling, tiling_of_token_grid
from molmo_core.tokens import ImageTokenIds


class FeatureTarget(NamedTuple):
    """Which patches become which tokens."""

    pooled_idx: torch.Tensor
    """int64 [B, n, k]: patches of each feature, into (crops · patches); a row of -1 is no feature."""
    token_id: int | None = None
    """The features belong, in order, to the tokens with this id ..."""
    positions: torch.Tensor | None = None
    """... or to these positions, int64 [B, n]."""


def add_features(
    x: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor, valid: torch.Tensor, target: FeatureTarget
) -> torch.Tensor:
    """Adds image features to the embeddings of their tokens.

    Args:
        x: [B, S, d].
        input_ids: int64 [B, S].
        features: [B, n, d].
        valid: bool [B, n]; the others are dropped.
        target: where they go.

    Raises:
        ValueError: a row has another number of tokens than of features.
    """
    length = x.shape[1]
    if target.positions is not None:
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        flat = (rows * length + target.positions)[valid]
    else:
        tokens = torch.eq(input_ids, target.token_id)  # type: ignore[arg-type]
        found, given = tokens.sum(1), valid.sum(1)
        if not torch.equal(found, given):
            row = int((found != given).nonzero()[0, 0])
            raise ValueError(
                f"row {row}: {int(found[row])} image tokens (id {target.token_id}) in input_ids, but {int(given[row])} image features; "
                "images, pooled_patches_idx and input_ids must come from the same preprocessing (was the sequence cut inside an image?)"
            )
        flat = tokens.flatten().nonzero()[:, 0]
    return x.flatten(0, 1).index_add(0, flat, features[valid].to(x.dtype)).view_as(x)


def tokens_of_input_idx(image_input_idx: torch.Tensor, crops: int, grid: tuple[int, int]) -> FeatureTarget:
    """The index style of the first release: the sequence position of every pooled cell of every crop.

    Args:
        image_input_idx: int64 [B, crops, cells] or flattened [B, crops·cells]; cells are 2x2 windows of a crop, row by row; negative
            positions are skipped.
        crops: crops per row of the batch.
        grid: patches of a crop, rows and columns.
    """
    pooling = (2, 2)
    cells = -(-grid[0] // pooling[0]) * -(-grid[1] // pooling[1])
    positions = image_input_idx.flatten(1)
    if positions.shape[1] != crops * cells:
        raise ValueError(
            f"image_input_idx holds sequence positions [B, crops, {cells}] for {crops} crops, got {tuple(image_input_idx.shape)}; "
            "for the patches of each token use pooled_patches_idx"
        )
    cell_patches = pool_patches(np.arange(grid[0] * grid[1]).reshape(grid), pooling)
    windows = np.concatenate([np.where(cell_patches >= 0, cell_patches + c * grid[0] * grid[1], -1) for c in range(crops)])
    idx = torch.where(positions[..., None] >= 0, torch.from_numpy(windows).to(positions.device), -1)
    return FeatureTarget(idx, positions=positions)


def pooled_idx_of_tokens(input_ids: torch.Tensor, crops: int, tokens: ImageTokenIds, settings: ImageSettings) -> torch.Tensor:
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
        ValueError: the tokens are no grids that this preprocessor makes, or need another number of crops.
    """
    rows = [_pooled_idx_of_row(row.tolist(), crops, tokens, settings, b) for b, row in enumerate(input_ids)]
    result = np.full((len(rows), max(len(r) for r in rows), max(r.shape[1] for r in rows)), -1, np.int64)
    for b, row in enumerate(rows):
        result[b, : len(row), : row.shape[1]] = row
    return torch.from_numpy(result).to(input_ids.device)


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
            patches, height = inside.count(tokens.patch), inside.count(tokens.col) or round(inside.count(tokens.patch) ** 0.5)
            if not height or patches % height:
                raise ValueError(f"row {row}: the image tokens at {begin}..{i} form no grid ({patches} tokens in {height} rows)")
            grids.append((height, patches // height))
            begin = None
    return grids
