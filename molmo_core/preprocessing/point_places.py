"""Where image tokens, their patches and the cells of those are in images and frames, in both directions.

A point is three numbers: the image token (counted over all tokens of the example, those of global crops included), the place of the
patch in the token, and the cell, column · 3 + row of the patch's 3 x 3. Only tokens of high-resolution crops and of frames can be
pointed at.

Source: the published MolmoPoint code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from molmo_core.preprocessing.tiling import Grid, ImageSettings, image_tiling, pool_patches, pooled_patches, raster_patches
from molmo_core.tokens import NO_MORE_POINTS

CELLS = 3
"""Rows and columns of cells in a patch."""
CELL_SIZE = 0.33
"""Of a patch, as published (not a third)."""


@dataclasses.dataclass(frozen=True)
class PointPlaces:
    """The patches of the images or frames of one example, and the image tokens that hold them."""

    grids: tuple[np.ndarray, ...]
    """int64 [rows, columns] of each image or frame: numbers of its patches, into crops·patches."""
    pooled_idx: np.ndarray
    """int64 [tokens, k], patches of each image token, -1 = absent."""
    times: np.ndarray | None = None
    """float64 [T], seconds, of frames; None: images."""
    cells: bool = True
    """Points have cells."""

    @classmethod
    def of_images(cls, sizes: Sequence[tuple[int, int]], settings: ImageSettings) -> PointPlaces:
        """Of images by their (width, height), cut as `settings` say.

        Raises:
            ValueError: images are not cut into high-resolution crops.
        """
        grids, pooled, crops = [], [np.empty((0, settings.pooling[0] * settings.pooling[1]), np.int64)], 0
        for width, height in sizes:
            tiling = image_tiling(height, width, settings)
            if tiling is None:
                raise ValueError("points need high-resolution crops: mm_preprocessor.crop_mode=overlap-and-resize-c2")
            start = crops * settings.patches_per_crop
            grids.append(raster_patches(tiling, settings) + settings.patches_per_crop + start)
            idx = pooled_patches(tiling, settings)
            pooled.append(np.where(idx >= 0, idx + start, -1))
            crops += 1 + tiling.rows * tiling.cols
        return cls(tuple(grids), np.concatenate(pooled))

    @classmethod
    def of_frames(cls, times: np.ndarray | Sequence[float], settings: ImageSettings, pooling: Grid) -> PointPlaces:
        """Of the frames of a video by their times, seconds."""
        patches = np.arange(len(times) * settings.patches_per_crop).reshape(len(times), *settings.crop_grid)
        return cls(tuple(patches), np.concatenate([pool_patches(frame, pooling) for frame in patches]), np.asarray(times, np.float64))

    def frame_at(self, seconds: float) -> int:
        """The frame whose time is nearest (the first of two)."""
        assert self.times is not None
        return int(np.abs(self.times - seconds).argmin())

    def locate(self, block: int, x: float, y: float) -> tuple[int, int, int]:
        """Token, patch and cell of a point in an image or frame.

        Args:
            block: number of the image or frame, from 0.
            x, y: shares of its width and height, 0 to 1.

        Raises:
            ValueError: there is no such image or frame.
        """
        if not 0 <= block < len(self.grids):
            raise ValueError(f"a point in image {block + 1}, but there are {len(self.grids)}")
        grid = self.grids[block]
        (row, within_y), (column, within_x) = (_split(share, size) for share, size in zip((y, x), grid.shape))
        token, slot = self._holders[int(grid[row, column])]
        return int(token), int(slot), within_x * CELLS + within_y

    def point(self, token: int, slot: int, cell: int | None) -> tuple[int, float, float] | None:
        """Image or frame (from 0) and shares x, y of what was chosen; None if that is no patch of an image (an absent one, or of a
        global crop).

        Args:
            token, slot: image token, and place of the patch in it.
            cell: of the patch; None: its middle.
        """
        if not 0 <= token < len(self.pooled_idx) or not 0 <= slot < self.pooled_idx.shape[1]:
            return None
        found = self._patches.get(int(self.pooled_idx[token, slot]))
        if found is None:
            return None
        block, row, column = found
        rows, columns = self.grids[block].shape
        if cell is None:
            return block, (column + 0.5) / columns, (row + 0.5) / rows
        x = (column + (cell // CELLS + 0.5) * CELL_SIZE) / columns
        return block, x, (row + (cell % CELLS + 0.5) * CELL_SIZE) / rows

    @functools.cached_property
    def _holders(self) -> np.ndarray:
        """int64 [patches, 2]: token and place of every patch."""
        tokens, slots = (self.pooled_idx >= 0).nonzero()
        holders = np.full((int(self.pooled_idx.max(initial=0)) + 1, 2), -1, np.int64)
        holders[self.pooled_idx[tokens, slots]] = np.stack((tokens, slots), 1)
        return holders

    @functools.cached_property
    def _patches(self) -> dict[int, tuple[int, int, int]]:
        """Image or frame, row and column of every patch that can be pointed at."""
        return {int(patch): (block, *at) for block, grid in enumerate(self.grids) for at, patch in np.ndenumerate(grid)}


def points_of(rows: np.ndarray, places: PointPlaces) -> list[tuple[int, float, float] | None]:
    """`PointPlaces.point` of rows int64 [n, 3]: chosen tokens, patches, cells (-1: points have none); ends of lists are left out."""
    return [places.point(t, slot, None if cell < 0 else cell) for t, slot, cell in rows.tolist() if t != NO_MORE_POINTS]


def _split(share: float, size: int) -> tuple[int, int]:
    """The patch of so many at a share of an axis, and the cell in it."""
    at = min(int(np.floor(size * share)), size - 1)
    return at, min(int(np.floor(CELLS * (size * share - at))), CELLS - 1)
