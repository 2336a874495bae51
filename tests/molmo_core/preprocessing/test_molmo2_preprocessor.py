"""Molmo2's sequences, beside the strings that transformers' processor writes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

from molmo_core.models.molmo2 import Molmo2Config
from molmo_core.preprocessing.molmo2_preprocessor import Molmo2Preprocessor

PROCESSOR: Any = SimpleNamespace(
    image_use_col_tokens=True, use_single_crop_col_tokens=False, use_single_crop_start_token=True, video_use_col_tokens=False,
    use_frame_special_tokens=True,
)  # fmt: skip
TURN = "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
PAGE = np.random.RandomState(0).randint(0, 256, (600, 800, 3), np.uint8)
SUBTITLES = [
    {"start": 0.2, "end": 1.0, "text": "Hello."},
    {"start": 2.0, "end": 2.4, "text": "How are you?"},
    {"start": 60.0, "end": 61.0, "text": "Far away."},
]


@pytest.fixture(scope="module")
def config(golden: Path) -> Molmo2Config:
    llm = {"embedding_size": 448, "vocab_size": 406, "tokenizer": {"identifier": str(golden / "tokenizer")}, "max_sequence_length": 16384}
    return Molmo2Config.new(llm=llm, vision_backbone={"image_model_type": "siglip2", "pooling_attention_mask": True})


@pytest.fixture(scope="module")
def preprocessor(config: Molmo2Config) -> Molmo2Preprocessor:
    built = config.build_preprocessor(for_inference=True)
    assert isinstance(built, Molmo2Preprocessor)
    return built


@pytest.fixture(scope="module")
def video(golden: Path) -> Path:
    return golden / "video-olmo" / "video.mp4"


def text_of(preprocessor: Molmo2Preprocessor, ids: np.ndarray) -> str:
    return preprocessor.tokenizer.decode(ids, skip_special_tokens=False, truncate_at_eos=False)


def test_image_is_the_string_of_the_published_processor(preprocessor: Molmo2Preprocessor) -> None:
    example = preprocessor({"image": PAGE, "messages": ["Hello?"]})
    published = Molmo2Processor.replace_image_token(PROCESSOR, {"image_grids": [[14, 14, 23, 33]]}, 0)
    assert text_of(preprocessor, example["input_ids"]) == "<|endoftext|>" + published + TURN
    assert (len(example["pooled_patches_idx"]), example["images"].shape) == (14 * 14 + 23 * 33, (7, 729, 588))


def test_several_images_are_numbered(preprocessor: Molmo2Preprocessor) -> None:
    example = preprocessor({"images": [PAGE, PAGE[:300, :300]], "messages": ["Hello?"]})
    published = [
        Molmo2Processor.replace_image_token(PROCESSOR, {"image_grids": [grid]}, 0) for grid in ([14, 14, 23, 33], [14, 14, 14, 14])
    ]
    assert text_of(preprocessor, example["input_ids"]) == f"<|endoftext|>Image 1{published[0]}Image 2{published[1]}{TURN}"
    assert example["pooled_patches_idx"].max() == 9 * 729 - 1
    assert example["metadata"]["image_sizes"] == [(800, 600), (300, 300)]


def test_video_is_the_string_of_the_published_processor(preprocessor: Molmo2Preprocessor, video: Path) -> None:
    example = preprocessor({"video": video, "messages": ["Hello?"]})
    times = example["metadata"]["frame_times"]
    assert times[:3] == [0.0, 0.5, 1.0]  # two a second ...
    assert times[-1] > 4.5  # ... and the last frame
    published = Molmo2Processor.get_video_string(PROCESSOR, torch.tensor([len(times), 9, 9]), times)
    assert text_of(preprocessor, example["input_ids"]) == "<|endoftext|>" + published + TURN
    assert example["images"].shape == (len(times), 729, 588)
    assert example["pooled_patches_idx"].tolist() == [
        [f * 729 + (3 * i + di) * 27 + 3 * j + dj for di in range(3) for dj in range(3)]
        for f in range(len(times)) for i in range(9) for j in range(9)
    ]  # fmt: skip


def test_clip_and_frame_limit(preprocessor: Molmo2Preprocessor, config: Molmo2Config, video: Path) -> None:
    example = preprocessor({"video": video, "clip_start": 1.0, "clip_end": 3.0, "messages": ["Hello?"]})
    assert example["metadata"]["frame_times"] == [0.0, 0.5, 1.0, 1.5, 1.875]
    few = Molmo2Config.from_dict({**config.as_dict(), "mm_preprocessor": {"max_frames": 3}})
    times = few.build_preprocessor(for_inference=True)({"video": video, "messages": ["Hello?"]})["metadata"]["frame_times"]
    assert len(times) == 3
    assert times[0] == 0
    assert times[-1] > 4.5


def test_one_pair_of_tokens_around_all_frames(config: Molmo2Config, video: Path) -> None:
    changed = Molmo2Config.from_dict({**config.as_dict(), "mm_preprocessor": {"per_frame_special_token": False, "max_frames": 2}})
    preprocessor = changed.build_preprocessor(for_inference=True)
    text = text_of(preprocessor, preprocessor({"video": video, "messages": ["Hello?"]})["input_ids"])
    assert text.startswith("<|endoftext|><im_start>0.0 <im_patch>")
    assert text.count("<im_start>") == text.count("<im_end>") == 1
    assert "<frame_start>" not in text


def test_subtitles_near_a_frame_follow_the_video(preprocessor: Molmo2Preprocessor, video: Path) -> None:
    example = preprocessor({"video": video, "subtitle": SUBTITLES, "messages": ["Hello?"]})
    text = text_of(preprocessor, example["input_ids"])
    assert text.endswith("<frame_end>subtitle\n0.2 - 1.0 Hello.\n2.0 - 2.4 How are you?\n" + TURN)


def test_subtitles_can_be_limited(config: Molmo2Config, video: Path) -> None:
    changed = Molmo2Config.from_dict({**config.as_dict(), "mm_preprocessor": {"max_subtitle_tokens": 8}})
    preprocessor = changed.build_preprocessor(for_inference=True)
    with_subtitles = preprocessor({"video": video, "subtitle": SUBTITLES, "messages": ["Hello?"]})["input_ids"]
    without = preprocessor({"video": video, "messages": ["Hello?"]})["input_ids"]
    assert len(with_subtitles) == len(without) + 8


def test_media_carry_no_loss_and_the_answer_does(config: Molmo2Config, video: Path) -> None:
    preprocessor = config.build_preprocessor(for_inference=False, is_training=False)
    example = preprocessor({"video": video, "subtitle": SUBTITLES, "messages": ["What?", "A ball."]})
    tokenizer = preprocessor.tokenizer
    answer = tokenizer.encode("A ball.")
    assert example["labels"][example["loss_masks"] > 0].tolist() == [*answer, tokenizer.eos_token_id]


def test_video_message_tree_shares_the_frames(config: Molmo2Config, video: Path) -> None:
    preprocessor = config.build_preprocessor(for_inference=False, is_training=False)
    rows = [{"question": "What?", "answer": "A ball."}, {"question": "Where?", "answer": "Here."}]
    example = preprocessor({"video": video, "style": "demo", "message_list": rows})
    segments = example["subsegment_ids"]
    frames = np.isin(example["input_ids"], preprocessor.tokenizer.image_patch_token_id)
    assert (segments[frames] == 10000).all()
    assert set(segments.tolist()) == {10000, 0, 1}


def test_pictures_of_the_frames_are_the_frames_of_the_patches(config: Molmo2Config, video: Path) -> None:
    changed = Molmo2Config.from_dict({**config.as_dict(), "mm_preprocessor": {"frame_sample_mode": "random", "max_frames": 3}})
    preprocessor = changed.build_preprocessor(for_inference=False, include_image=True)
    example = preprocessor({"video": video, "messages": ["What?", "A ball."]}, np.random.RandomState(5))
    again = preprocessor({"video": video, "messages": ["What?", "A ball."]}, np.random.RandomState(5))
    other = preprocessor({"video": video, "messages": ["What?", "A ball."]}, np.random.RandomState(6))
    assert example["metadata"]["frame_times"] == again["metadata"]["frame_times"] != other["metadata"]["frame_times"]
    for frame, patches in zip(example["metadata"]["image_arrays"], example["images"], strict=True):
        assert abs(frame.mean() - patches.mean()) < 2


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"image": PAGE, "video": "clip.mp4", "messages": ["Hello?"]}, "not both"),
        ({"subtitle": SUBTITLES, "messages": ["Hello?"]}, "no video"),
        ({"video": "nowhere.mp4", "messages": ["Hello?"]}, "nowhere.mp4"),
    ],
)
def test_wrong_examples(preprocessor: Molmo2Preprocessor, example: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessor(example)


def test_wrong_subtitles(preprocessor: Molmo2Preprocessor, video: Path) -> None:
    with pytest.raises(ValueError, match="subtitle 0 needs start"):
        preprocessor({"video": video, "subtitle": [{"text": "Hello."}], "messages": ["Hello?"]})
