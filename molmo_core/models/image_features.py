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
    """... or to these positions, int64 [B, n]. Neither: what becomes of them is decided later."""


def add_features(
    x: torch.Tensor, input_ids: torch.Tensor, features: torch.Tensor, valid: torch.Tensor, target: FeatureTarget
) -> torch.Tensor:
    """Adds image features to the embeddings of their tokens. Nothing here waits for a GPU.

    Args:
        x: [B, S, d].
        input_ids: int64 [B, S].
        features: [B, n, d].
        valid: bool [B, n]; the others are dropped.
        target: where they go.

    Raises:
        ValueError: a row has another number of tokens than of features (on the CPU only: see `check_target`).
    """
    positions = target.positions
    if positions is None:
        tokens = torch.eq(input_ids, target.token_id)  # type: ignore[arg-type]
        if x.device.type == "cpu":
            _check_counts(tokens, valid, target)
        # The features of a row go to its tokens one after the other.
        positions = token_positions(tokens, valid.shape[1]).gather(1, (valid.cumsum(1) - 1).clamp(min=0))
        valid = valid & (positions >= 0)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    flat = torch.where(valid, rows * x.shape[1] + positions, 0).flatten()  # what is dropped adds 0
    added = torch.where(valid[..., None], features, 0).to(x.dtype).flatten(0, 1)
    return x.flatten(0, 1).index_add(0, flat, added).view_as(x)


def token_positions(where: torch.Tensor, n: int) -> torch.Tensor:
    """Positions of the true entries of each row: bool [B, S] -> int64 [B, n], in order, padded with -1."""
    order = (~where).int().argsort(dim=1, stable=True)[:, :n]
    order = torch.nn.functional.pad(order, (0, n - order.shape[1]))
    return order.masked_fill(torch.arange(n, device=where.device) >= where.sum(1, keepdim=True), -1)


def check_target(input_ids: torch.Tensor, target: FeatureTarget, patches: int) -> None:
    """Checks on the CPU what a GPU would not tell: that the patches are there, and that each token has its feature.

    Args:
        input_ids: int64 [B, S].
        target: its index tensor, too, on the CPU.
        patches: of all crops of a row.

    Raises:
        ValueError: which row, and the numbers.
    """
    idx = target.pooled_idx
    if idx.numel() and int(idx.max()) >= patches:
        raise ValueError(f"a token reads patch {int(idx.max())}, but the images have {patches} (crops · patches)")
    if target.token_id is not None:
        _check_counts(input_ids == target.token_id, (idx >= 0).any(-1), target)


def _check_counts(tokens: torch.Tensor, valid: torch.Tensor, target: FeatureTarget) -> None:
    found, given = tokens.sum(1), valid.sum(1)
    if not torch.equal(found, given):
        row = int((found != given).nonzero()[0, 0])
        raise ValueError(
            f"row {row}: {int(found[row])} image tokens (id {target.token_id}) in input_ids, but {int(given[row])} image features; "
            "images, pooled_patches_idx and input_ids must come from the same preprocessing (was the sequence cut inside an image?)"
        )


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
