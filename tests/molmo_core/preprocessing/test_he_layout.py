"""HeMolmo's layout; the published arrays are compared in tests/molmo_core/models/test_he_molmo.py."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from molmo_core.config import ConfigError
from molmo_core.preprocessing.configs import HePreprocessorConfig
from molmo_core.preprocessing.he_layout import he_layout, interpolation
from molmo_core.preprocessing.tiling import ImageSettings, Tiling

SETTINGS = ImageSettings(crop_size=(56, 56), resize_mode="siglip", max_crops=6, overlap_margins=(1, 1))
IDS: Any = SimpleNamespace(
    image_start_token_id=1, image_end_token_id=2, image_patch_token_id=3, image_col_token_id=4, image_low_token_id=5
)  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "factor"), [((2, 2), (3, 4), 2), ((14, 14), (23, 33), 2), ((3, 2), (2, 9), 3), ((1, 1), (1, 1), 1)]
)
def test_interpolation_is_that_of_torch(low: tuple[int, int], high: tuple[int, int], factor: int) -> None:
    cells = torch.rand(1, 1, low[0] * factor, low[1] * factor)
    resized = torch.nn.functional.interpolate(cells, size=high, mode="bilinear", align_corners=False, antialias=False)
    ordered = cells[0, 0].unflatten(1, (low[1], factor)).unflatten(0, (low[0], factor)).transpose(1, 2).flatten()
    weights = torch.from_numpy(interpolation(low, high, factor))
    torch.testing.assert_close(ordered @ weights, resized.flatten(), atol=1e-5, rtol=1e-5)


def test_number_of_tokens_kept() -> None:
    config = HePreprocessorConfig()
    for ratio, kept in ((0.25, 3), (0.3, 4), (1.0, 12)):
        layout = he_layout(Tiling(2, 3), SETTINGS, config, IDS, ratio, 2, True)
        assert (layout.ids == IDS.image_patch_token_id).sum() == kept == len(layout.arrays["high_res_features_weights"])
    layout = he_layout(Tiling(2, 3), SETTINGS, HePreprocessorConfig(num_high_res_features=20), IDS, 0.25, 2, True)
    assert (layout.ids == IDS.image_patch_token_id).sum() == 20  # more than there are: as published, the rest stays empty


def test_without_column_tokens() -> None:
    layout = he_layout(Tiling(2, 3), SETTINGS, HePreprocessorConfig(use_col_tokens=False), IDS, 0.5, 2, False)
    assert layout.ids.tolist() == [1, 5, 5, 5, 5, 2, 1, *[3] * 6, 2]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, *[7] * 6, 13]
    assert layout.arrays["high_res_pos_ids"].tolist() == list(range(12))


def test_low_resolution_view_of_the_high_resolution_crops() -> None:
    config = HePreprocessorConfig(low_res_from_high=4)
    layout = he_layout(Tiling(2, 3), SETTINGS, config, IDS, 0.25, 2, True)
    low = layout.arrays["low_res_tokens_idx"]
    assert low.shape == (2 * 2, 16)  # 6 x 8 patches by 4 x 4
    used = np.unique(low[low >= 0])
    assert used.min() >= SETTINGS.patches_per_crop  # none of the global crop
    assert len(used) == 6 * 8
    with pytest.raises(ValueError, match="overlap-and-resize-c2"):
        he_layout(None, SETTINGS, config, IDS, 0.25, 2, True)


def test_published_spellings() -> None:
    assert HePreprocessorConfig.new(max_text_len=100).max_text_tokens == 100
    with pytest.raises(ConfigError, match="indicate_k"):
        HePreprocessorConfig.new(indicate_k="k")
