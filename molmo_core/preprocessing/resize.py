"""Resizing as each vision encoder was trained with it. uint8 in, uint8 out, within 1/255 of the published float code.

Two kinds of interpolation are needed. Without antialiasing (SigLIP; and whenever an image is enlarged bilinearly, where
antialiasing changes nothing) OpenCV does it, vectorised. With antialiasing Pillow does it, as the published code's
torchvision resampling follows Pillow's definition.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from molmo_core.preprocessing.tiling import ResizeMode

cv2.setNumThreads(0)  # data workers own one core each; OpenCV's own pool would take all of them


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
        return Resized(_bicubic_antialiased(image, height, width), (0, 0, height, width))
    # Sizes in float32 and truncated, as published.
    scale = min(np.float32(height) / np.float32(image.shape[0]), np.float32(width) / np.float32(image.shape[1]))
    inner_h = max(1, int(np.float32(image.shape[0]) * scale))
    inner_w = max(1, int(np.float32(image.shape[1]) * scale))
    inner = _bilinear_antialiased(image, inner_h, inner_w)
    if (inner_h, inner_w) == (height, width):
        return Resized(inner, (0, 0, height, width))
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    result = np.full((height, width, 3), round(pad_value * 255), np.uint8)
    result[top : top + inner_h, left : left + inner_w] = inner
    return Resized(result, (top, left, top + inner_h, left + inner_w))


def _bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Weighs the two nearest samples on each axis (half-pixel centres), however much the image shrinks."""
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _bilinear_antialiased(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Triangle filter, widened by the factor of shrinking."""
    if height >= image.shape[0] and width >= image.shape[1]:
        return _bilinear(image, height, width)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _bicubic_antialiased(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cubic filter (a = -0.5), widened by the factor of shrinking.

    In float per channel: Pillow's 8-bit path clips between its two passes, which at sharp edges is off by up to 16/255.
    """
    result = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32))
        resized = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
        result[:, :, channel] = np.clip(resized + np.float32(0.5), 0, 255)
    return result
