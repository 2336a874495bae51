"""Tilings, pooling indices and token counts, from sizes alone."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.nn.configs import VitConfig
from molmo_core.preprocessing.configs import (
    HePreprocessorConfig,
    Molmo2PreprocessorConfig,
    MolmoPreprocessorConfig,
    VideoPreprocessorConfig,
)
from molmo_core.preprocessing.images import ImageSettings, image_token_counts, image_tokens, join_images, preprocess_image
from molmo_core.preprocessing.tiling import (
    Tiling,
    image_tiling,
    pool_patches,
    pooled_patches,
    raster_grid,
    raster_patches,
    single_crop_pooling,
    tiling_of_token_grid,
    token_grids,
)

CLIP = ImageSettings()
SIGLIP = ImageSettings(
    crop_size=(378, 378), resize_mode="siglip", max_crops=8, use_single_crop_col_tokens=False, use_single_crop_start_token=True
)
TINY = ImageSettings(crop_size=(56, 56), overlap_margins=(1, 1), max_crops=6)

# Of the published configurations: size -> (tiling, tokens, crops) for CLIP with 12 and 36 crops, SigLIP (Molmo2) with 8 and 24.
TABLE = {
    (224, 224): [((1, 1), 316, 2), ((1, 1), 316, 2), ((1, 1), 410, 2), ((1, 1), 410, 2)],
    (336, 336): [((1, 1), 316, 2), ((1, 1), 316, 2), ((1, 1), 410, 2), ((1, 1), 410, 2)],
    (378, 378): [((2, 2), 580, 5), ((2, 2), 580, 5), ((1, 1), 410, 2), ((1, 1), 410, 2)],
    (512, 512): [((2, 2), 580, 5), ((2, 2), 580, 5), ((2, 2), 752, 5), ((2, 2), 752, 5)],
    (480, 640): [((2, 3), 740, 7), ((2, 3), 740, 7), ((2, 2), 752, 5), ((2, 2), 752, 5)],
    (600, 800): [((3, 4), 1196, 13), ((3, 4), 1196, 13), ((2, 3), 982, 7), ((2, 3), 982, 7)],
    (768, 1024): [((3, 4), 1196, 13), ((3, 5), 1420, 16), ((2, 3), 982, 7), ((3, 4), 1619, 13)],
    (1024, 1024): [((3, 3), 972, 10), ((5, 5), 2140, 26), ((2, 2), 752, 5), ((4, 4), 2006, 17)],
    (720, 1280): [((3, 4), 1196, 13), ((3, 6), 1644, 19), ((2, 4), 1189, 9), ((3, 5), 1949, 16)],
    (1080, 1920): [((3, 4), 1196, 13), ((4, 8), 2644, 33), ((2, 4), 1189, 9), ((4, 6), 2804, 25)],
    (3300, 2550): [((4, 3), 1204, 13), ((7, 5), 2860, 36), ((3, 2), 992, 7), ((6, 4), 2823, 25)],
    (200, 1600): [((1, 7), 892, 8), ((1, 7), 892, 8), ((1, 6), 1068, 7), ((1, 6), 1068, 7)],
}
COLUMNS = [CLIP, dataclasses.replace(CLIP, max_crops=36), SIGLIP, dataclasses.replace(SIGLIP, max_crops=24)]


@pytest.mark.parametrize("size", TABLE, ids=lambda s: f"{s[0]}x{s[1]}")
def test_published_counts(size: tuple[int, int]) -> None:
    for config, (tiling, tokens, crops) in zip(COLUMNS, TABLE[size]):
        assert image_tiling(*size, config) == tiling
        assert image_token_counts(*size, config) == (tokens, crops)


def test_worst_cases() -> None:
    def worst(config: ImageSettings) -> int:
        tilings = [(i, j) for i in range(1, config.max_crops + 1) for j in range(1, config.max_crops // i + 1)]
        return max(
            sum(r * (c + (g > 0 or config.use_single_crop_col_tokens)) + 2 for g, (r, c) in enumerate(token_grids(Tiling(*t), config)))
            for t in tilings
        )

    assert [worst(c) for c in COLUMNS] == [1460, 3956, 1400, 3680]
    assert worst(dataclasses.replace(SIGLIP, use_single_crop_col_tokens=True)) == 1414


@pytest.mark.parametrize(("height", "width"), [(100, 1600), (1600, 100), (112, 1600), (1, 1), (20, 5000), (111, 112)])
def test_sides_below_the_margins(height: int, width: int) -> None:
    """As in the published code: a side under 112 pixels means one crop; exactly 112 leaves the decision to the other side."""
    for config in COLUMNS:
        tiling = image_tiling(height, width, config)
        if min(height, width) < 112:
            assert tiling == (1, 1)
        else:
            assert tiling is not None
            assert tiling.rows == 1
            assert tiling.cols > 1


encoders = st.sampled_from(
    [CLIP, SIGLIP, TINY, dataclasses.replace(TINY, overlap_margins=(2, 0)), dataclasses.replace(SIGLIP, pooling=(3, 2))]
)
tilings = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda t: Tiling(*t))


@settings(max_examples=60, deadline=None)
@given(encoders, tilings)
def test_raster_is_the_published_construction(config: ImageSettings, tiling: Tiling) -> None:
    """Number every patch of every crop, strike out the margins that a neighbour provides, bring what is left into raster order."""
    (rows, cols), (before, after) = config.crop_grid, config.overlap_margins
    grid = np.arange(tiling.rows * tiling.cols * rows * cols).reshape(tiling.rows, tiling.cols, rows, cols)
    for i in range(tiling.rows):
        for j in range(tiling.cols):
            if i > 0:
                grid[i, j, :before] = -1
            if j > 0:
                grid[i, j, :, :before] = -1
            if i < tiling.rows - 1:
                grid[i, j, rows - after :] = -1
            if j < tiling.cols - 1:
                grid[i, j, :, cols - after :] = -1
    flat = grid.swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(raster_patches(tiling, config), flat[flat >= 0].reshape(raster_grid(tiling, config)))


@settings(max_examples=60, deadline=None)
@given(encoders, tilings)
def test_pooled_patches(config: ImageSettings, tiling: Tiling) -> None:
    index = pooled_patches(tiling, config)
    grids = token_grids(tiling, config)
    assert index.shape == (sum(r * c for r, c in grids), config.pooling[0] * config.pooling[1])
    used = index[index >= 0]
    assert len(np.unique(used)) == len(used)  # no patch is read twice
    assert set(range(config.patches_per_crop)) <= set(used.tolist())  # the global crop completely
    rows, cols = raster_grid(tiling, config)
    assert len(used) == config.patches_per_crop + rows * cols
    assert (index >= 0).any(axis=1).all()
    assert tiling_of_token_grid(grids[1], config) == tiling


def test_token_grid_without_tiling() -> None:
    with pytest.raises(ValueError, match="13 x 20"):
        tiling_of_token_grid((13, 20), CLIP)


def test_pooling_windows_stick_out_evenly() -> None:
    np.testing.assert_array_equal(
        pool_patches(np.arange(9).reshape(3, 3), (2, 2)), [[0, 1, 3, 4], [2, -1, 5, -1], [6, 7, -1, -1], [8, -1, -1, -1]]
    )
    np.testing.assert_array_equal(
        pool_patches(np.arange(4).reshape(1, 4), (3, 3)), [[-1, -1, -1, -1, 0, 1, -1, -1, -1], [-1, -1, -1, 2, 3, -1, -1, -1, -1]]
    )
    assert single_crop_pooling(SIGLIP, (3, 3), crop=2).shape == (81, 9)
    assert single_crop_pooling(SIGLIP, (3, 3), crop=2).min() == 2 * 729


def test_cached_indices_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        pooled_patches(Tiling(1, 1), CLIP)[0, 0] = 5


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["default", "siglip", "dino"]),
    st.sampled_from(["resize", "overlap-and-resize-c2"]),
)
def test_plan_equals_the_real_thing(height: int, width: int, mode: str, crop_mode: str) -> None:
    config = dataclasses.replace(TINY, resize_mode=mode, crop_mode=crop_mode)
    features = preprocess_image(np.zeros((height, width, 3), np.uint8), config)
    ids = SimpleNamespace(
        image_start_token_id=1, image_end_token_id=2, image_patch_token_id=3, image_col_token_id=4, low_res_image_start_token_id=5
    )
    tokens = image_tokens(features.grids, ids, config)
    assert image_token_counts(height, width, config) == (len(tokens), len(features.images))
    assert (tokens == 3).sum() == len(features.pooled_patches_idx)
    assert features.pooled_patches_idx.max() < features.images.shape[0] * features.images.shape[1]


def test_layouts() -> None:
    ids = SimpleNamespace(
        image_start_token_id=1, image_end_token_id=2, image_patch_token_id=3, image_col_token_id=4, low_res_image_start_token_id=5
    )
    grids = ((2, 2), (1, 3))
    assert image_tokens(grids, ids, CLIP).tolist() == [1, 3, 3, 4, 3, 3, 4, 2, 1, 3, 3, 3, 4, 2]
    assert image_tokens(grids, ids, SIGLIP).tolist() == [5, 3, 3, 3, 3, 2, 1, 3, 3, 3, 4, 2]
    assert image_tokens(grids[:1], ids, dataclasses.replace(CLIP, use_col_tokens=False)).tolist() == [1, 3, 3, 3, 3, 2]
    ids.low_res_image_start_token_id = None
    with pytest.raises(ValueError, match="use_single_crop_start_token"):
        image_tokens(grids, ids, SIGLIP)


def test_several_images() -> None:
    rng = np.random.default_rng(0)
    odd = dataclasses.replace(TINY, pooling=(3, 3))  # 3x3 windows on 4x4 patches: entries of -1 everywhere
    parts = [preprocess_image(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), odd) for h, w in [(60, 90), (40, 40), (120, 70)]]
    joined = join_images(parts)
    pixels = joined.images.reshape(-1, joined.images.shape[-1])
    start = 0
    for part in parts:
        rows = joined.pooled_patches_idx[start : start + len(part.pooled_patches_idx)]
        start += len(rows)
        np.testing.assert_array_equal(rows < 0, part.pooled_patches_idx < 0)
        own = part.images.reshape(-1, part.images.shape[-1])
        valid = rows >= 0
        np.testing.assert_array_equal(pixels[rows[valid]], own[part.pooled_patches_idx[valid]])
    assert start == len(joined.pooled_patches_idx)
    assert joined.image_masks is not None
    assert joined.image_masks.shape == joined.images.shape[:2]


def test_settings_from_configurations() -> None:
    siglip = VitConfig.preset("siglip")
    molmo2 = ImageSettings.from_configs(siglip, Molmo2PreprocessorConfig())
    assert molmo2 == SIGLIP
    assert ImageSettings.from_configs(VitConfig(), MolmoPreprocessorConfig()) == CLIP
    assert ImageSettings.from_configs(VitConfig(), HePreprocessorConfig(image_pooling_h=3, image_pooling_w=1)).pooling == (3, 1)
    video = ImageSettings.from_configs(siglip, VideoPreprocessorConfig(), pooling=(3, 3))
    assert video.crop_mode == "resize"
    assert video.pooling == (3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": (335, 336)}, "multiple of the patch size"),
        ({"overlap_margins": (12, 12)}, "margins"),
        ({"crop_size": (336, 350)}, "square"),
        ({"max_crops": 0}, "max_crops"),
        ({"pooling": (0, 2)}, "pooling"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **change)
