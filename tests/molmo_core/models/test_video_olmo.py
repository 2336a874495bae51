"""VideoOlmo against the published numbers; its configuration, indices and attention."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from molmo_core.config import ConfigError
from molmo_core.models.video_olmo import VideoOlmo, VideoOlmoConfig
from molmo_core.preprocessing.configs import VideoPreprocessorConfig

CASES = ["per-frame", "mixed-res"]


def load(folder: Path, *overrides: str) -> VideoOlmo:
    model = VideoOlmoConfig.load(folder / "config.yaml", list(overrides)).build_model()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_published_logits(golden: Path, case: str) -> None:
    folder = golden / "video-olmo" / case
    batch, expected = load_file(folder / "batch.safetensors"), load_file(folder / "expected.safetensors")
    with torch.no_grad():
        output = load(folder)(**batch)
    torch.testing.assert_close(output.logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_published_generation(golden: Path, case: str) -> None:
    folder = golden / "video-olmo" / case
    output = load(folder).generate(**load_file(folder / "prompt.safetensors"), max_new_tokens=10)
    assert output.token_ids.tolist() == load_file(folder / "expected.safetensors")["greedy"][:, 0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_pixels_and_indices_from_the_tokens(golden: Path, case: str) -> None:
    """images=[B, T, C, H, W] without an index give what patches with an index give."""
    folder = golden / "video-olmo" / case
    model, batch = load(folder), load_file(folder / "batch.safetensors")
    pixels = batch["images"].unflatten(2, (4, 4)).unflatten(4, (14, 14, 3))  # [B, T, rows, cols, 14, 14, 3]
    pixels = pixels.permute(0, 1, 6, 2, 4, 3, 5).reshape(1, -1, 3, 56, 56)
    with torch.no_grad():
        by_index = model(**batch).logits
        by_tokens = model(input_ids=batch["input_ids"], images=pixels).logits
    torch.testing.assert_close(by_tokens, by_index, atol=1e-5, rtol=0)


def test_frames_that_do_not_fit_the_tokens_are_an_error(golden: Path) -> None:
    folder = golden / "video-olmo" / "mixed-res"
    model, batch = load(folder), load_file(folder / "batch.safetensors")
    with pytest.raises(ValueError, match="5 frames, images has 4"):
        model(input_ids=batch["input_ids"], images=batch["images"][:, :4])
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == model.config.image_tokens.low).nonzero()[0, 0]] = 5
    with pytest.raises(ValueError, match="frame 1 has 3 tokens"):
        model(input_ids=ids, images=batch["images"])


def test_low_resolution_tokens_can_have_their_own_embedding(golden: Path) -> None:
    folder = golden / "video-olmo" / "mixed-res"
    batch = load_file(folder / "batch.safetensors")
    with torch.no_grad():
        shared, own = load(folder)(**batch).logits, load(folder, "shared_low_high_embedding=false")(**batch).logits
    assert (shared - own).abs().max() > 1e-3


def test_image_tokens_may_see_the_question(golden: Path) -> None:
    """With image_to_question a word of the question changes what frames compute; with image_tokens it does not."""
    folder = golden / "video-olmo" / "mixed-res"
    batch = load_file(folder / "batch.safetensors")
    words = batch["input_ids"].clone()
    words[0, -4] = 31  # in the question, which stands behind the frames
    first_frame = slice(8, 30)
    changed = {}
    for mode in ("image_tokens", "image_to_question"):
        model = load(folder, f"bi_directional_attn={mode}")
        with torch.no_grad():
            a, b = model(**batch).logits, model(**{**batch, "input_ids": words}).logits
        changed[mode] = bool((a - b)[0, first_frame].abs().max() > 1e-6)
    assert changed == {"image_tokens": False, "image_to_question": True}


def test_frame_settings_at_the_top_drive_the_preprocessor(tmp_path: Path) -> None:
    config = VideoOlmoConfig.new(max_frames=24, frame_sampling="random")
    assert (config.mm_preprocessor.max_frames, config.mm_preprocessor.frame_sample_mode) == (24, "random")
    config.save(tmp_path / "config.yaml")
    again = VideoOlmoConfig.load(tmp_path / "config.yaml", ["max_frames=8"])
    assert (again.max_frames, again.mm_preprocessor.max_frames) == (8, 8)
    assert (again.frame_sampling, again.mm_preprocessor.frame_sample_mode) == ("random", "random")


def test_published_names_inside_the_preprocessor_are_read(golden: Path) -> None:
    config = VideoOlmoConfig.load(golden / "video-olmo" / "per-frame" / "config.yaml")
    assert (config.max_frames, config.frame_sampling) == (6, "fps")
    for make in (VideoOlmoConfig.new, VideoOlmoConfig):
        built = make(mm_preprocessor=VideoPreprocessorConfig(max_frames=12))
        assert built.max_frames == built.mm_preprocessor.max_frames == 12
        built = make(
            max_frames=16, frame_sampling="uniform", mm_preprocessor=VideoPreprocessorConfig(max_frames=32, frame_sample_mode="fps")
        )
        assert (built.max_frames, built.frame_sampling) == (16, "uniform"), "what is given wins, also if it is the default"
        built = dataclasses.replace(built, mm_preprocessor=VideoPreprocessorConfig(max_frames=4))
        assert built.max_frames == built.mm_preprocessor.max_frames == 4
        built = make(max_frames=8, frame_sampling="fps")
        assert (built.mm_preprocessor.max_frames, built.mm_preprocessor.frame_sample_mode) == (8, "fps")


def test_defaults_and_contradictions() -> None:
    config = VideoOlmoConfig.new()
    assert (config.max_frames, config.frame_sampling) == (16, "uniform")
    with pytest.raises(ConfigError, match="set max_frames only"):
        VideoOlmoConfig.new(max_frames=8, mm_preprocessor={"max_frames": 9})
    with pytest.raises(ConfigError, match="frame_sampling"):
        VideoOlmoConfig.new(frame_sampling="every-other")


def test_batch_equals_single(golden: Path) -> None:
    """A clip of five frames beside one of three and a text-only row."""
    folder = golden / "video-olmo" / "per-frame"
    model = load(folder)
    clip = {k: v[0].numpy() for k, v in load_file(folder / "batch.safetensors").items()}
    short = {k: v[: 16 * 3 if k in ("input_ids", "labels", "loss_masks", "position_ids") else 4 * 3] for k, v in clip.items()}
    short["images"] = clip["images"][:3]
    text = {k: clip[k][-4:] for k in ("input_ids", "labels", "loss_masks")} | {"position_ids": np.arange(4)}
    collate = model.config.build_collator(None, None, include_metadata=False)
    with torch.no_grad():
        together = model(**collate([clip, short, text])).logits
        for row, logits in zip((clip, short, text), together):
            alone = model(**collate([row])).logits[0]
            torch.testing.assert_close(logits[: len(alone)], alone, atol=1e-5, rtol=0)
