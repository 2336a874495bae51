"""Images against what the published code and transformers make of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from molmo_core.preprocessing.images import ImageSettings, image_token_counts, image_tokens, preprocess_image

NORMALISATION = {
    "openai": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "dino": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
ENCODERS = {
    "openai": ImageSettings(),
    "siglip": ImageSettings(crop_size=(378, 378), resize_mode="siglip"),
    "dino": ImageSettings(resize_mode="dino"),
}
MOLMO2 = ImageSettings(
    crop_size=(378, 378), resize_mode="siglip", max_crops=8, use_single_crop_col_tokens=False, use_single_crop_start_token=True
)
IDS = SimpleNamespace(
    image_start_token_id=448,
    image_end_token_id=449,
    image_patch_token_id=450,
    image_col_token_id=451,
    low_res_image_start_token_id=None,
)
ONE = 1 / 255 + 1e-6


def synthetic_image(height: int, width: int, params: list[int]) -> np.ndarray:
    """The integer formula of the golden files."""
    a, b, c = params
    y, x = np.mgrid[:height, :width]
    red, green = (x * a // 8 + y * b // 8) % 256, (x * x // (64 * c) + y * 3 // 4) % 256
    return np.stack([red, green, (x * y // (64 * a) + c * y // 16) % 256], axis=-1).astype(np.uint8)


def assert_pixels(images: np.ndarray, expected: dict[str, np.ndarray], encoder: str) -> None:
    """Whole patches within 1/255, and the mean of every patch (float32, normalised) likewise."""
    mean, std = (np.array(v) for v in NORMALISATION[encoder])
    pixels = images.reshape(*images.shape[:2], -1, 3) / 255
    probe = expected["probe_index"]
    reference = expected["probe_patches"].reshape(len(probe), -1, 3) * std + mean
    assert np.abs(pixels[probe[:, 0], probe[:, 1]] - reference).max() <= ONE
    normalised = ((pixels - mean) / std).mean(axis=(2, 3))
    assert np.abs(normalised - expected["patch_mean"]).max() * std.min() <= ONE


def cases(name: str) -> list:
    path = Path(__file__).parents[2] / "golden" / "preprocess" / f"{name}.json"
    return [pytest.param(case, id=case["case"]) for case in json.loads(path.read_text())["cases"]]


def load(golden: Path, name: str, case: str) -> tuple[dict, dict[str, np.ndarray]]:
    folder = golden / "preprocess"
    with np.load(folder / f"{name}.npz") as arrays:
        prefix = f"{case}/"
        return json.loads((folder / f"{name}.json").read_text()), {
            k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)
        }


@pytest.mark.parametrize("case", cases("image_preprocessing"))
def test_published_molmo_code(golden: Path, case: dict) -> None:
    data, expected = load(golden, "image_preprocessing", case["case"])
    size = case["case"].split("/")[1]
    height, width = map(int, size.split("x"))
    base = ENCODERS[case["encoder"]]
    settings = ImageSettings(
        crop_size=base.crop_size,
        resize_mode=base.resize_mode,
        max_crops=case["max_crops"],
        legacy_image_mask=case["legacy_image_mask"],
    )
    features = preprocess_image(synthetic_image(height, width, data["params"][size]), settings)

    np.testing.assert_array_equal(features.pooled_patches_idx, expected["pooled_patches_idx"])
    tokens = image_tokens(features.grids, IDS, settings)
    np.testing.assert_array_equal(expected["input_tokens"][1 : 1 + len(tokens)], tokens)  # after BOS
    assert expected["input_tokens"][1 + len(tokens) :].max() < 448
    assert image_token_counts(height, width, settings) == (len(tokens), case["crops"])
    assert features.images.dtype == np.uint8
    assert_pixels(features.images, expected, case["encoder"])
    if "image_masks" in expected:
        assert features.image_masks is not None
        np.testing.assert_array_equal(features.image_masks, expected["image_masks"])
    else:
        assert features.image_masks is None


@pytest.mark.parametrize("case", cases("molmo2_image_processing"))
def test_transformers_molmo2(golden: Path, case: dict) -> None:
    data, expected = load(golden, "molmo2_image_processing", case["case"])
    height, width = map(int, case["case"].split("x"))
    features = preprocess_image(synthetic_image(height, width, data["params"][case["case"]]), MOLMO2)

    np.testing.assert_array_equal(features.pooled_patches_idx, expected["image_token_pooling"])
    np.testing.assert_array_equal(np.ravel(features.grids), expected["image_grids"][0])
    assert len(features.images) == expected["image_num_crops"][0]
    assert_pixels(features.images, expected, "siglip")
