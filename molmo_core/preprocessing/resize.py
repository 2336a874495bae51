"""Resizing as each vision encoder was trained with it. uint8 in, uint8 out, within 1/255 of the published float code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from molmo_core.preprocessing.tiling import ResizeMode


class Resized(NamedTuple):
    """A resized image."""

    pixels: np.ndarray
    """uint8 [height, width, 3]."""
    box: tuple[int, int, int, int]
    """Where the image is in it: top, left, bottom, right (all of it unless it was padded)."""


def resize(image: np.ndarray, height: int, width: int, mode: ResizeMode, pad_value: float = 0.0) -> Resized:
    """Resizes to `height` x `width`.

    Args:
        image: uint8 [h, w, 3].
        mode: `default` keeps the aspect ratio (antialiased bilinear) and pads; the others stretch: `siglip` with
            bilinear interpolation without antialiasing, `dino` and `metaclip` with antialiased bicubic.
        pad_value: padding, 0-1 scale.
    """
    if mode == "siglip":
        return Resized(_bilinear(image, height, width), (0, 0, height, width))
    if mode in ("dino", "metaclip"):
        return Resized(_antialiased(image, height, width, Image.Resampling.BICUBIC), (0, 0, height, width))
    # Sizes in float32 and truncated, as published.
    scale = min(np.float32(height) / np.float32(image.shape[0]), np.float32(width) / np.float32(image.shape[1]))
    inner_h = max(1, int(np.float32(image.shape[0]) * scale))
    inner_w = max(1, int(np.float32(image.shape[1]) * scale))
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    result = np.full((height, width, 3), round(pad_value * 255), np.uint8)
    result[top : top + inner_h, left : left + inner_w] = _antialiased(image, inner_h, inner_w, Image.Resampling.BILINEAR)
    return Resized(result, (top, left, top + inner_h, left + inner_w))


def _antialiased(image: np.ndarray, height: int, width: int, filter: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), filter))


def _bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation of the two nearest samples on each axis, half-pixel centres, no antialiasing."""
    y0, y1, wy = _taps(image.shape[0], height)
    x0, x1, wx = _taps(image.shape[1], width)
    rows = image[y0] * (1 - wy)[:, None, None] + image[y1] * wy[:, None, None]
    result = rows[:, x0] * (1 - wx)[None, :, None] + rows[:, x1] * wx[None, :, None]
    return (result + np.float32(0.5)).astype(np.uint8)


def _taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two samples of every output position and the weight of the second."""
    position = np.maximum((np.arange(out, dtype=np.float32) + np.float32(0.5)) * np.float32(size / out) - np.float32(0.5), 0)
    first = np.minimum(position.astype(np.int64), size - 1)
    return first, np.minimum(first + 1, size - 1), (position - first).astype(np.float32)
