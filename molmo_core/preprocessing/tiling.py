"""Which crops an image is cut into and which patches each pooled token reads. Shapes only: no pixel is touched here.

An image is seen twice: once whole, resized to one crop (the global crop, always crop 0), and, in the mode
`overlap-and-resize-c2`, once at higher resolution, resized to a canvas of rows x columns overlapping crops. Neighbouring
crops share margins; of the patches in a margin only those of one crop are used, so that the used patches of all crops
form one raster grid. Pooling windows lie on that raster grid and on the grid of the global crop.

Source: the published Molmo and Molmo2 code (`select_tiling`, `overlap-and-resize-c2`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple, Protocol

import numpy as np

ResizeMode = Literal["default", "siglip", "dino", "metaclip"]
CropMode = Literal["resize", "overlap-and-resize-c2"]
Grid = tuple[int, int]
"""Rows, columns."""


class VisionEncoder(Protocol):
    """What the preprocessing has to know of a vision encoder (`VitConfig` has it)."""

    image_default_input_size: tuple[int, int]
    image_patch_size: int
    resize_mode: ResizeMode
    pad_value: float


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Everything that decides what an image becomes. Immutable and hashable; derive others with `dataclasses.replace`."""

    crop_size: tuple[int, int] = (336, 336)
    """Height and width of a crop, pixels."""
    patch_size: int = 14
    resize_mode: ResizeMode = "default"
    pad_value: float = 0.0
    """Value of padding on the 0-1 scale (`resize_mode="default"` only)."""
    crop_mode: CropMode = "overlap-and-resize-c2"
    max_crops: int = 12
    """High-resolution crops at most; the global crop is not counted."""
    overlap_margins: tuple[int, int] = (4, 4)
    """Patches shared with a neighbour: left/top, right/bottom."""
    pooling: Grid = (2, 2)
    """Rows and columns of patches in one pooled token."""
    legacy_image_mask: bool = False
    use_col_tokens: bool = True
    """A column token ends every row of the high-resolution grid."""
    use_single_crop_col_tokens: bool = True
    """And every row of the global crop."""
    low_tokens_global_crop: bool = False
    """The tokens of the global crop are `image_low_token_id` (MolmoPoint)."""
    use_single_crop_start_token: bool = False
    """The global crop begins with `low_res_image_start_token_id` (Molmo2)."""

    def __post_init__(self) -> None:
        height, width = self.crop_size
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(f"the crop size {self.crop_size} is not a multiple of the patch size {self.patch_size}")
        if self.max_crops < 1:
            raise ValueError(f"max_crops={self.max_crops}: at least 1 is needed")
        if min(self.pooling) < 1 or min(self.overlap_margins) < 0:
            raise ValueError(f"pooling={self.pooling} must be positive and overlap_margins={self.overlap_margins} not negative")
        if self.crop_mode != "resize" and (height != width or self.window < 1):
            raise ValueError(
                f"overlapping crops need a square crop and margins {self.overlap_margins} that leave something of its "
                f"{self.crop_grid} patches; the crop is {self.crop_size}"
            )

    @classmethod
    def from_configs(cls, vit: VisionEncoder, config: object, **changes: object) -> ImageSettings:
        """Joins an encoder and a preprocessor configuration (any class of `preprocessing.configs`); `changes` override."""
        values: dict[str, object] = {
            "crop_size": tuple(vit.image_default_input_size),
            "patch_size": vit.image_patch_size,
            "resize_mode": vit.resize_mode,
            "pad_value": vit.pad_value,
        }
        for field in dataclasses.fields(cls):
            if hasattr(config, field.name):
                value = getattr(config, field.name)
                values[field.name] = tuple(value) if isinstance(value, list) else value
        for prefix in ("pooling", "image_pooling"):
            if hasattr(config, f"{prefix}_h"):
                values["pooling"] = (getattr(config, f"{prefix}_h"), getattr(config, f"{prefix}_w"))
        return cls(**{**values, **changes})  # type: ignore[arg-type]

    @property
    def crop_grid(self) -> Grid:
        """Patches of one crop: rows, columns."""
        return self.crop_size[0] // self.patch_size, self.crop_size[1] // self.patch_size

    @property
    def patches_per_crop(self) -> int:
        return self.crop_grid[0] * self.crop_grid[1]

    @property
    def window(self) -> int:
        """Patches from one crop to the next."""
        return self.crop_grid[0] - sum(self.overlap_margins)


class Tiling(NamedTuple):
    """The high-resolution crops of an image."""

    rows: int
    cols: int


def select_tiling(height: int, width: int, window: int, max_crops: int) -> Tiling:
    """The rows x columns of windows that hold the image with the least upscaling, or else the least downscaling.

    Sizes may be zero or negative (an image smaller than the margins); the published code does not guard against it,
    with the effect that an image with one side below the margins always gets one crop, and so does it here.
    """
    candidates = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops + 1) if i * j <= max_crops]
    candidates.sort(key=lambda c: (c[0] * c[1], c[0]))
    with np.errstate(divide="ignore"):
        scales = np.array(candidates, np.float32) * np.float32(window) / np.array([height, width], np.float32)
    scale = scales.min(axis=1)
    if (scale < 1).all():
        best = int(scale.argmax())
    else:
        best = int(np.where(scale < 1, np.float32(10e9), scale).argmin())
    return Tiling(*candidates[best])


@functools.lru_cache(maxsize=4096)
def image_tiling(height: int, width: int, settings: ImageSettings) -> Tiling | None:
    """The high-resolution crops of an image of `height` x `width` pixels; None where only the global crop is made."""
    if settings.crop_mode == "resize":
        return None
    margin = sum(settings.overlap_margins) * settings.patch_size
    return select_tiling(height - margin, width - margin, settings.window * settings.patch_size, settings.max_crops)


def raster_grid(tiling: Tiling, settings: ImageSettings) -> Grid:
    """Used patches of all high-resolution crops together: rows, columns."""
    margin = sum(settings.overlap_margins)
    return tiling.rows * settings.window + margin, tiling.cols * settings.window + margin


def pooled_grid(grid: Grid, pooling: Grid) -> Grid:
    """Pooled tokens of a grid of patches: rows, columns (incomplete windows at the edges count)."""
    return -(-grid[0] // pooling[0]), -(-grid[1] // pooling[1])


def token_grids(tiling: Tiling | None, settings: ImageSettings) -> tuple[Grid, ...]:
    """Rows and columns of pooled tokens of the global crop and, if there is a tiling, of the high-resolution grid."""
    grids = (pooled_grid(settings.crop_grid, settings.pooling),)
    return grids if tiling is None else (*grids, pooled_grid(raster_grid(tiling, settings), settings.pooling))


def tiling_of_token_grid(grid: Grid, settings: ImageSettings) -> Tiling:
    """The tiling whose high-resolution token grid is `grid`: the inverse of `token_grids(tiling, settings)[1]`.

    Raises:
        ValueError: no tiling gives that grid.
    """
    margin = sum(settings.overlap_margins)
    tiling = Tiling(*((n * pool - margin) // settings.window for n, pool in zip(grid, settings.pooling)))
    if min(tiling) < 1 or pooled_grid(raster_grid(tiling, settings), settings.pooling) != tuple(grid):
        raise ValueError(f"no tiling of {settings.window}-patch windows gives a grid of {grid[0]} x {grid[1]} pooled tokens")
    return tiling


def raster_patches(tiling: Tiling, settings: ImageSettings) -> np.ndarray:
    """Numbers of the used patches in raster order.

    Returns:
        int64 [rows, columns] of `raster_grid`, numbering the patches of the high-resolution crops (crop by crop, from 0).
    """

    def axis(n: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every raster row (or column): the crop that provides it, and where in that crop it is."""
        before, _ = settings.overlap_margins
        position = np.arange(n * settings.window + sum(settings.overlap_margins))
        crop = np.clip((position - before) // settings.window, 0, n - 1)
        return crop, position - crop * settings.window

    (crop_row, row), (crop_col, col) = axis(tiling.rows), axis(tiling.cols)
    crop = crop_row[:, None] * tiling.cols + crop_col[None, :]
    return (crop * settings.patches_per_crop + row[:, None] * settings.crop_grid[1] + col[None, :]).astype(np.int64)


def pool_patches(patches: np.ndarray, pooling: Grid) -> np.ndarray:
    """Groups a grid of patch numbers into pooling windows; windows that stick out are centred and filled with -1.

    Args:
        patches: int [rows, columns].

    Returns:
        int64 [windows, rows·columns of a window], windows in raster order.
    """
    (rows, cols), (pool_h, pool_w) = patches.shape, pooling
    n_rows, n_cols = pooled_grid((rows, cols), pooling)
    add_h, add_w = n_rows * pool_h - rows, n_cols * pool_w - cols
    padded = np.pad(patches, ((add_h // 2, (add_h + 1) // 2), (add_w // 2, (add_w + 1) // 2)), constant_values=-1)
    return padded.reshape(n_rows, pool_h, n_cols, pool_w).swapaxes(1, 2).reshape(n_rows * n_cols, pool_h * pool_w).astype(np.int64)


def single_crop_pooling(settings: ImageSettings, pooling: Grid | None = None, crop: int = 0) -> np.ndarray:
    """Pooled indices of one whole crop (a global crop, a video frame): int64 [tokens, k], for crop number `crop`."""
    patches = np.arange(settings.patches_per_crop).reshape(settings.crop_grid) + crop * settings.patches_per_crop
    return pool_patches(patches, pooling or settings.pooling)


@functools.lru_cache(maxsize=1024)
def pooled_patches(tiling: Tiling | None, settings: ImageSettings) -> np.ndarray:
    """Pooled indices of an image: int64 [tokens, k] into its crops·patches, -1 = absent. Cached, hence read-only.

    The tokens of the global crop (crop 0) come first, then those of the high-resolution grid, each in raster order.
    """
    result = single_crop_pooling(settings)
    if tiling is not None:
        high = pool_patches(raster_patches(tiling, settings) + settings.patches_per_crop, settings.pooling)
        result = np.concatenate([result, high])
    result.flags.writeable = False
    return result
