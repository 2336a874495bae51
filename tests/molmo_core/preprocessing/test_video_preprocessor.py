"""VideoOlmo's sequences against the published ones, from the clip itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from molmo_core.models.video_olmo import VideoOlmoConfig
from molmo_core.preprocessing.video_preprocessor import VideoOlmoPreprocessor, time_prefix
from molmo_core.preprocessing.videos import VideoFeatures

RECORD = {"style": "demo", "question": "How many cups?", "answer": "3"}


def build(golden: Path, case: str, *overrides: str, for_inference: bool = False, is_training: bool = False) -> VideoOlmoPreprocessor:
    config = VideoOlmoConfig.load(golden / "video-olmo" / case / "config.yaml", list(overrides))
    preprocessor = config.build_preprocessor(for_inference=for_inference, is_training=is_training)
    assert isinstance(preprocessor, VideoOlmoPreprocessor)
    return preprocessor


def record(golden: Path) -> dict[str, Any]:
    return {**RECORD, "video": golden / "video-olmo" / "video.mp4"}


@pytest.mark.parametrize("kind", ["batch", "prompt"])
@pytest.mark.parametrize("case", ["per-frame", "mixed-res"])
def test_published_inputs(golden: Path, case: str, kind: str) -> None:
    example = build(golden, case, for_inference=kind == "prompt")(record(golden))
    expected = load_file(golden / "video-olmo" / case / f"{kind}.safetensors")
    assert set(example) == {*expected, "metadata"}
    pixels = example["images"] / 127.5 - 1
    assert np.abs(pixels - expected.pop("images")[0]).max() <= 2 / 255 + 1e-6
    for name, value in expected.items():
        np.testing.assert_array_equal(example[name], value[0], err_msg=name)
    assert example["metadata"]["frame_times"] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("sampled-fps-prefix", "FPS 2.00"),
        ("time-delta-prefix", "Sampling Delta 0.50"),
        ("fps-prefix", "FPS 0.50"),
        ("per-frame", ""),
        ("skip_time", ""),
    ],
)
def test_time_prefixes(mode: str, text: str) -> None:
    frames = VideoFeatures(np.empty(0), None, np.array([0.0, 0.5, 1.0]), 2.0, (8, 8))
    assert time_prefix(mode, frames) == text
    frames.sampling_fps = None  # evenly spread frames: from their times
    assert time_prefix(mode, frames) == text
    frames.times = frames.times[:1]
    assert time_prefix(mode, frames) == ""


def test_random_frames_in_training_only(golden: Path) -> None:
    settings = ("max_frames=4", "frame_sampling=random", "mm_preprocessor.max_frames=4", "mm_preprocessor.frame_sample_mode=random")
    training = build(golden, "per-frame", *settings, is_training=True)
    times = [training(record(golden), np.random.RandomState(seed))["metadata"]["frame_times"] for seed in (1, 1, 2)]
    assert times[0] == times[1] != times[2]
    assert all(t == sorted(t) for t in times)
    prompt = build(golden, "per-frame", *settings, for_inference=True)
    assert prompt(record(golden), np.random.RandomState(1))["metadata"]["frame_times"] == prompt(record(golden))["metadata"]["frame_times"]


def test_text_alone_and_images(golden: Path) -> None:
    preprocessor = build(golden, "per-frame")
    assert set(preprocessor(RECORD)) == {"input_ids", "labels", "loss_masks", "position_ids", "metadata"}
    with pytest.raises(ValueError, match="VideoOlmo takes a video"):
        preprocessor({**RECORD, "image": np.zeros((56, 56, 3), np.uint8)})
