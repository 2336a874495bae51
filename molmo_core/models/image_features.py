"""From either style of image index (or none) to features added to token embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch

from molmo_core.preprocessing import index_of_tokens
from molmo_core.preprocessing.tiling import ImageSettings
from molmo_core.tokens import ImageTokenIds


class FeatureTarget(NamedTuple):
    """Which patches become which tokens."""

    pooled_idx: torch.Tensor
    """int64 [B, n, k]: patches of each feature, into (crops · patches); a row of -1 is not a feature."""
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
    windows = index_of_tokens.crop_windows(crops, grid)
    cells = len(windows) // crops
    positions = image_input_idx.flatten(1)
    if positions.shape[1] != crops * cells:
        raise ValueError(
            f"image_input_idx holds sequence positions [B, crops, {cells}] for {crops} crops, got {tuple(image_input_idx.shape)}; "
            "for the patches of each token use pooled_patches_idx"
        )
    idx = torch.where(positions[..., None] >= 0, torch.from_numpy(windows).to(positions.device), -1)
    return FeatureTarget(idx, positions=positions)


def pooled_idx_of_tokens(input_ids: torch.Tensor, crops: int, tokens: ImageTokenIds, settings: ImageSettings) -> torch.Tensor:
    """`pooled_patches_idx` int64 [B, n, k] for images that come without: `index_of_tokens.pooled_idx` of the tokens int64 [B, S]."""
    return torch.from_numpy(index_of_tokens.pooled_idx(input_ids.cpu().numpy(), crops, tokens, settings)).to(input_ids.device)


def share_low_embedding(ids: torch.Tensor, tokens: ImageTokenIds) -> torch.Tensor:
    """Token ids with the low-resolution patch token replaced by the patch token."""
    return ids.masked_fill(ids == tokens.low, tokens.patch)
