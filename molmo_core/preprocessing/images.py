"""From pixels to the patches and pooling indices that the vision backbone takes.

`preprocess_image(load_image(source), settings)` gives uint8 patches: normalisation happens on the device. The shapes
come from `tiling`, the pixels from `resize`; this file cuts and joins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from molmo_core.preprocessing.image_tokens import image_token_counts, image_tokens
from molmo_core.preprocessing.resize import Resized, resize
from molmo_core.preprocessing.tiling import Grid, ImageSettings, Tiling, image_tiling, pooled_patches, raster_grid, token_grids

__all__ = [
    "ImageFeatures",
    "ImageSettings",
    "image_token_counts",
    "image_tokens",
    "join_images",
    "preprocess_image",
]


@dataclasses.dataclass
class ImageFeatures:
    """One image (or several joined ones, see `join_images`) as the vision backbone takes it."""

    images: np.ndarray
    """uint8 [crops, patches, p·p·3]; crop 0 is the global one. Inside a patch: row, column, channel."""
    image_masks: np.ndarray | None
    """float32 [crops, patches], the share of real pixels of each patch; None for encoders that do not pad."""
    pooled_patches_idx: np.ndarray
    """int64 [tokens, k] into crops·patches, -1 = absent; global tokens first, each grid in raster order."""
    grids: tuple[Grid, ...]
    """Rows and columns of pooled tokens: the global crop and, unless `crop_mode="resize"`, the high-resolution grid."""
    tiling: Tiling | None
    """Rows and columns of high-resolution crops."""
    size: tuple[int, int]
    """Width and height of the image, pixels."""


def preprocess_image(image: np.ndarray, settings: ImageSettings) -> ImageFeatures:
    """Resizes an image, cuts its crops and patches, and says which patches are pooled.

    Args:
        image: uint8 [h, w, 3], RGB (`load_image`).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 pixels [h, w, 3] (load_image gives them), got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    tiling = image_tiling(height, width, settings)
    views = [resize(image, *settings.crop_size, settings.resize_mode, settings.pad_value)]
    tilings = [Tiling(1, 1)]
    if tiling is not None:
        rows, cols = raster_grid(tiling, settings)
        canvas = rows * settings.patch_size, cols * settings.patch_size
        views.append(resize(image, *canvas, settings.resize_mode, settings.pad_value))
        tilings.append(tiling)
    patches = np.empty((sum(t.rows * t.cols for t in tilings), settings.patches_per_crop, settings.patch_size**2 * 3), np.uint8)
    start = 0
    for view, t in zip(views, tilings):
        start = _cut(view.pixels, t, settings, patches, start)
    return ImageFeatures(
        images=patches,
        image_masks=_masks(views, tilings, settings) if settings.resize_mode == "default" else None,
        pooled_patches_idx=pooled_patches(tiling, settings),
        grids=token_grids(tiling, settings),
        tiling=tiling,
        size=(width, height),
    )


def join_images(features: Sequence[ImageFeatures]) -> ImageFeatures:
    """Several images as one: crops after another, indices moved on accordingly (absent ones stay -1).

    `grids` of the result are those of all images after one another; `tiling` and `size` are those of the first.
    """
    first = features[0]
    if len(features) == 1:
        return first
    indices, offset = [], 0
    for f in features:
        indices.append(np.where(f.pooled_patches_idx >= 0, f.pooled_patches_idx + offset, -1))
        offset += f.images.shape[0] * f.images.shape[1]
    masks = [f.image_masks for f in features if f.image_masks is not None]
    return ImageFeatures(
        images=np.concatenate([f.images for f in features]),
        image_masks=np.concatenate(masks) if masks else None,
        pooled_patches_idx=np.concatenate(indices),
        grids=tuple(grid for f in features for grid in f.grids),
        tiling=first.tiling,
        size=first.size,
    )


def _cut(pixels: np.ndarray, tiling: Tiling, settings: ImageSettings, out: np.ndarray, start: int) -> int:
    """Cuts a canvas into overlapping crops of patches, written to out[start:]; returns the end."""
    p, (rows, cols), step = settings.patch_size, settings.crop_grid, settings.window
    run = f"V{p * 3}"  # one row of a patch: contiguous in the canvas and in the patch, so copied as one opaque element
    raster = np.ascontiguousarray(pixels).reshape(pixels.shape[0] // p, p, -1).view(run).swapaxes(1, 2)
    crops = out.view(run).reshape(len(out), rows, cols, p)
    for i in range(tiling.rows):
        for j in range(tiling.cols):
            crops[start] = raster[i * step : i * step + rows, j * step : j * step + cols]
            start += 1
    return start


def _masks(views: Sequence[Resized], tilings: Sequence[Tiling], settings: ImageSettings) -> np.ndarray:
    """Share of real pixels of every patch of every crop: float32 [crops, patches]."""
    p, (rows, cols), step = settings.patch_size, settings.crop_grid, settings.window
    masks = []
    for view, tiling in zip(views, tilings):
        top, left, bottom, right = view.box
        covered = []
        for low, high, size in ((top, bottom, view.pixels.shape[0]), (left, right, view.pixels.shape[1])):
            edges = np.arange(0, size + 1, p)
            covered.append(np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, p))
        share = (covered[0][:, None] * covered[1][None, :] / (p * p)).astype(np.float32)
        masks += [
            share[i * step : i * step + rows, j * step : j * step + cols].ravel() for i in range(tiling.rows) for j in range(tiling.cols)
        ]
    if settings.legacy_image_mask and len(masks) > 1:
        # The 0924 checkpoints were trained with each crop carrying the next one's mask and the last one a mask of -1.
        masks = [*masks[1:], np.full_like(masks[0], -1)]
    return np.stack(masks)
