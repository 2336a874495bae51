"""`measure` tells the length of an example from the sizes of its images: exactly what preprocessing then gives."""

import numpy as np
import pytest

from molmo_core.models.base import BaseModelConfig
from molmo_core.preprocessing.video_readers import open_video

SIZES = [(64, 64), (30, 200), (480, 640), (1000, 90), (768, 1024)]
EXAMPLE = {
    "message_list": [
        {"style": "pointing", "label": "cats", "points": [[10.0, 20.0]], "point_scale": 100},
        {"style": "long_caption", "text": "Two cats on a mat."},
        {"style": "demo", "question": "How many?", "answer": "2"},
    ]
}


@pytest.mark.parametrize("folder", ["molmo-qwen2-clip", "molmo-qwen2-siglip-bidir", "he-molmo"])
def test_exact_for_one_image(golden, folder):
    preprocessor = BaseModelConfig.load(golden / folder / "config.yaml").build_preprocessor(for_inference=False, max_seq_len=4096)
    for i, (height, width) in enumerate(SIZES):
        example = {"image": np.zeros((height, width, 3), np.uint8), "style": "demo", "question": "How many?", "answer": "2"}
        made = preprocessor(dict(example), rng=np.random.RandomState(i))
        assert preprocessor.measure(example, [(height, width)], np.random.RandomState(i)) == (len(made["input_ids"]), len(made["images"]))


def test_exact_with_random_prompts_and_resolution(golden):
    """The same random numbers are used for the same things."""
    overrides = ["mm_preprocessor.high_res_max_crops=12", "mm_preprocessor.p_high_res=0.5", "data_formatter.prompt_templates=uber_model"]
    config = BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir" / "config.yaml", overrides=overrides)
    preprocessor = config.build_preprocessor(for_inference=False, max_seq_len=600)
    seen = set()
    for seed in range(30):
        height, width = SIZES[seed % len(SIZES)]
        example = {"image": np.zeros((height, width, 3), np.uint8), **EXAMPLE}
        made = preprocessor(dict(example), rng=np.random.RandomState(seed))
        found = preprocessor.measure(example, [(height, width)], np.random.RandomState(seed))
        assert found == (len(made["input_ids"]), len(made["images"]))
        seen.add((seed % len(SIZES), found[1]))
    assert len(seen) > len(SIZES), "both resolutions were drawn"


def test_exact_for_several_images_and_none(golden):
    preprocessor = BaseModelConfig.load(golden / "molmo-qwen2-clip" / "config.yaml").build_preprocessor(for_inference=False)
    for sizes in ([], SIZES[:2], SIZES[:3]):
        example = {"images": [np.zeros((h, w, 3), np.uint8) for h, w in sizes], "messages": ["Which is larger?", "The last."]}
        made = preprocessor(dict(example), rng=np.random.RandomState(0))
        crops = len(made["images"]) if sizes else 0
        assert preprocessor.measure(example, sizes, np.random.RandomState(0)) == (len(made["input_ids"]), crops)


@pytest.mark.parametrize("folder", ["per-frame", "mixed-res"])
@pytest.mark.parametrize("mode", ["uniform", "fps", "random", "uniform_last_frame"])
def test_exact_for_video(golden, folder, mode):
    overrides = [f"mm_preprocessor.frame_sample_mode={mode}"]
    config = BaseModelConfig.load(golden / "video-olmo" / folder / "config.yaml", overrides=overrides)
    preprocessor = config.build_preprocessor(for_inference=False)
    video = golden / "video-olmo" / "video.mp4"
    reader = open_video(video)
    times, fps = reader.timestamps, reader.fps
    reader.close()
    for clip in ({}, {"clip_start": 0.3, "clip_end": 1.0}):
        example = {"video": str(video), "style": "demo", "question": "How many cups?", "answer": "3", **clip}
        made = preprocessor(dict(example), rng=np.random.RandomState(5))
        measured = preprocessor.measure_video(example, times, fps, np.random.RandomState(5))
        assert measured == (len(made["input_ids"]), len(made["images"]))


def test_adaptive_sampling_has_no_length_beforehand(golden):
    overrides = ["mm_preprocessor.frame_sample_mode=adaptive"]
    config = BaseModelConfig.load(golden / "video-olmo" / "per-frame" / "config.yaml", overrides=overrides)
    with pytest.raises(ValueError, match="adaptive sampling chooses frames by their pixels"):
        config.build_preprocessor(for_inference=False).measure_video({"question": "q", "answer": "a"}, np.arange(9) / 3, 3.0)
