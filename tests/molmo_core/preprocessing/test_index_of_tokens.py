"""The index rebuilt from the tokens is the one that the preprocessor made them from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.preprocessing.image_tokens import grid_tokens
from molmo_core.preprocessing.index_of_tokens import crop_windows, frame_idx, pooled_idx
from molmo_core.preprocessing.tiling import ImageSettings, Tiling, pooled_grid, pooled_patches, single_crop_pooling, token_grids
from molmo_core.tokens import ImageTokenIds

TOKENS = ImageTokenIds.of("molmo", 100)
tilings = st.builds(Tiling, st.integers(1, 4), st.integers(1, 4))


def grid(size: tuple[int, int], token: int, columns: bool = True) -> np.ndarray:
    return grid_tokens(size, token, TOKENS.start, TOKENS.end, TOKENS.col if columns else None)


@given(
    rows=st.lists(st.lists(tilings, max_size=3), min_size=1, max_size=3).filter(any),
    resize=st.booleans(),
    pooling=st.integers(1, 2),
    single_columns=st.booleans(),
)
def test_images(rows, resize, pooling, single_columns):
    settings = ImageSettings(
        crop_size=(28, 28), patch_size=7, overlap_margins=(1, 1), pooling=(pooling, pooling),
        crop_mode="resize" if resize else "overlap-and-resize-c2",
    )  # fmt: skip
    ids, expected, most = [], [], 0
    for images in rows:
        parts, index, used = [np.array([1, 2])], [np.empty((0, pooling**2), np.int64)], 0
        for tiling in images:
            made = None if resize else tiling
            parts += [grid(g, TOKENS.patch, n > 0 or single_columns) for n, g in enumerate(token_grids(made, settings))]
            pooled = pooled_patches(made, settings)
            index.append(np.where(pooled >= 0, pooled + used * settings.patches_per_crop, -1))
            used += 1 + (made.rows * made.cols if made else 0)
        ids.append(np.concatenate(parts))
        expected.append(np.concatenate(index))
        most = max(most, used)
    batch = np.full((len(rows), max(map(len, ids)) + 1), -1)
    for row, tokens in zip(batch, ids):
        row[: len(tokens)] = tokens
    found = pooled_idx(batch, most, TOKENS, settings)
    for row, index in zip(found, expected, strict=True):
        assert row[: len(index)].tolist() == index.tolist()
        assert (row[len(index) :] == -1).all()
    with pytest.raises(ValueError, match=f"need {most} crops, images has {most - 1}"):
        pooled_idx(batch, most - 1, TOKENS, settings)


@given(rows=st.lists(st.lists(st.booleans(), max_size=4), min_size=1, max_size=3).filter(any))
def test_frames(rows):
    settings = ImageSettings(crop_size=(42, 42), patch_size=7, crop_mode="resize", pooling=(3, 3))
    high_pooling, most = (2, 3), max(map(len, rows))
    poolings = {False: settings.pooling, True: high_pooling}
    kinds = {False: TOKENS.low, True: TOKENS.patch}
    ids = [np.concatenate([[5], *(grid(pooled_grid(settings.crop_grid, poolings[high]), kinds[high]) for high in row)]) for row in rows]
    batch = np.full((len(rows), max(map(len, ids))), -1)
    for row, tokens in zip(batch, ids):
        row[: len(tokens)] = tokens
    for high, found in enumerate(frame_idx(batch, most, TOKENS, settings, high_pooling)):
        for row, frames in zip(found, rows, strict=True):
            parts = [single_crop_pooling(settings, poolings[bool(high)], n) for n, frame in enumerate(frames) if frame == bool(high)]
            expected = np.concatenate(parts) if parts else row[:0]
            assert row[: len(expected)].tolist() == expected.tolist()
            assert (row[len(expected) :] == -1).all()
    with pytest.raises(ValueError, match=f"{most} frames, images has {most - 1}"):
        frame_idx(batch, most - 1, TOKENS, settings, high_pooling)


def test_tokens_that_are_not_a_grid():
    settings = ImageSettings(crop_size=(28, 28), patch_size=7, crop_mode="resize")
    with pytest.raises(ValueError, match=r"row 0: the image tokens at 0\.\.4 are not a grid"):
        pooled_idx(np.array([[TOKENS.start, *[TOKENS.patch] * 3, TOKENS.end]]), 1, TOKENS, settings)
    with pytest.raises(ValueError, match="row 0: image 0 has 9 image tokens, this preprocessor makes 4"):
        pooled_idx(grid((3, 3), TOKENS.patch)[None], 1, TOKENS, settings)


def test_windows_of_crops():
    found = crop_windows(2, (3, 4))
    assert found.shape == (2 * 4, 4)
    assert sorted(found[found >= 0].tolist()) == list(range(24))
    assert found[:4].max() == 11
