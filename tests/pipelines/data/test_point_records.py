"""Records with points as MolmoPoint's examples: what the tokens of points stand for, wherever the points were; and what is rejected."""

import json

import numpy as np
import pytest
from PIL import Image

from molmo_core.model_configs.molmo_point import MolmoPointConfig
from molmo_core.preprocessing.point_places import points_of
from molmo_core.tokens import NO_MORE_POINTS
from pipelines.data.builder import ExampleBuilder, example_rng
from pipelines.data.config import PrepareConfig, TokenizerTraining
from pipelines.data.preparation import easy_vqa
from pipelines.data.preparation.train_tokenizer import model_for
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record, open_records

WIDE, TALL = (80, 60), (60, 90)


@pytest.fixture(scope="module")
def config(golden):
    """Several frames of the golden clip, and images whose every patch can be pointed at."""
    overrides = ["data_formatter.debug=false", "mm_preprocessor.max_frames=4"]
    return MolmoPointConfig.load(golden / "molmo-point" / "a" / "config.yaml", overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden):
    home = tmp_path_factory.mktemp("points")
    for name, size in (("wide", WIDE), ("tall", TALL)):
        Image.new("RGB", size, "red").save(home / f"{name}.png")
    (home / "clip.mp4").symlink_to(golden / "video-olmo" / "video.mp4")
    return home


@pytest.fixture
def build(config, folder):
    """`build(fields, length)`: a record's example, and its text."""

    def example(fields, length=None):
        record = Record(str(folder / "records.jsonl"), 0, fields)
        builder = ExampleBuilder(config.build_preprocessor(for_inference=False, is_training=False, max_seq_len=length), 10**7)
        made = builder(record, example_rng(0, 0, 0, 0))
        return made, config.build_tokenizer().decode(made["input_ids"], skip_special_tokens=False, truncate_at_eos=False)

    return example


def found(config, example):
    """Where its points are: image or frame, and shares of width and height."""
    rows = example["point_target_ids"]
    return points_of(rows[(rows[:, 0] >= 0) & (rows[:, 2] >= 0)], config.point_places(example["metadata"]))


def close(places, expected, columns=4, rows=4):
    """Within the cells of grids of patches."""
    assert [block for block, _, _ in places] == [block for block, _, _ in expected]
    for (_, x, y), (_, true_x, true_y) in zip(places, expected, strict=True):
        assert abs(x - true_x) <= 0.52 / 3 / columns
        assert abs(y - true_y) <= 0.52 / 3 / rows


def test_points_in_pixels(build, config):
    example, text = build({"image": "wide.png", "label": "Dogs", "points": [[70, 55], [8, 6]]})
    close(found(config, example), [(0, 0.1, 0.1), (0, 0.875, 55 / 60)])
    point = "<|token_index|><|vit_index|><|vit_loc|>"
    assert text.endswith(f'assistant\n<points coords="{point}1{point}2<|token_index|>">dogs</point>')
    assert example["point_target_ids"][-1].tolist() == [NO_MORE_POINTS, -1, -1]


def test_counts(build, config, monkeypatch):
    """Only the number; with `remove_repeats` that of the points that are left."""
    fields = {"image": "wide.png", "label": "dogs", "point_scale": 100, "points": [[10, 10], [10.5, 10], [80, 80]]}
    example, text = build({**fields, "style": "count"})
    assert "point_target_ids" not in example
    assert text.endswith("assistant\n3")
    assert "total of 3." in build({**fields, "style": "point_count"})[1]
    monkeypatch.setattr(config.mm_preprocessor, "remove_repeats", "all")
    example, text = build({**fields, "style": "point_count"})
    assert text.endswith("total of 2.")
    assert len(example["point_target_ids"]) == 3


def test_points_in_several_images(build, config):
    fields = {"images": ["wide.png", "tall.png"], "label": "cups", "question": "Where?", "image_points": [[[8, 6]], [[30, 45], [54, 9]]]}
    example, text = build(fields)
    places = found(config, example)
    assert [block for block, _, _ in places] == [0, 1, 1]
    close(sorted(places), sorted([(0, 0.1, 0.1), (1, 0.9, 0.1), (1, 0.5, 0.5)]))
    assert "user\nWhere?" in text


def test_points_in_a_video(build, config):
    fields = {"video": "clip.mp4", "style": "video_point_count", "label": "ball", "timestamps": [0.0, 1.0], "point_scale": 100}
    example, text = build({**fields, "points": [[[10, 90]], [[60, 40], [90, 10]]]})
    times = example["metadata"]["frame_times"]
    second = int(np.abs(np.array(times) - 1).argmin())
    close(sorted(found(config, example)), [(0, 0.1, 0.9), (second, 0.6, 0.4), (second, 0.9, 0.1)])
    assert "Counting the <points" in text
    assert text.endswith("shows a total of 3.")


def test_tracks(build, config):
    fields = {"video": "clip.mp4", "style": "video_point_track_per_frame", "label": "ball", "timestamps": [0.0, 1.0], "point_scale": 1}
    example, text = build({**fields, "tracks": [{"a": None, "b": [0.9, 0.9]}, {"a": [0.1, 0.1], "b": [0.9, 0.8]}]})
    assert len(found(config, example)) == 3
    numbers = [part[0] for part in text.split("<|vit_loc|>")[1:]]
    assert numbers[0] == "1"
    assert sorted(numbers) == ["1", "1", "2"]
    assert "<tracks coords=" in text


def test_the_track_of_a_given_point(build, config):
    """The point of the question is text, and not a label of a token; the answer's points are after it."""
    fields = {"video": "clip.mp4", "style": "video_single_point_track_per_frame", "label": "ball", "timestamps": [0.0, 1.0]}
    example, text = build({**fields, "point_scale": 1, "tracks": [{"a": [0.1, 0.9]}, {"a": [0.6, 0.4]}]})
    question, answer = text.split("assistant\n")
    assert '<points coords="0.0 1 100 900">ball</points>' in question
    assert answer.startswith('<tracks coords="<|token_index|>')
    second = int(np.abs(np.array(example["metadata"]["frame_times"]) - 1).argmin())
    close(found(config, example), [(second, 0.6, 0.4)])


def tree():
    points = [[8, 6], [70, 55], [40, 30]]
    tasks = [{"style": "pointing", "label": "dogs", "points": points}, {"style": "user_qa", "question": "Red?", "answer": "Yes."}]
    return {"image": "wide.png", "message_list": [*tasks, {"style": "point_count", "label": "cats", "points": [[70, 6]], "weight": 0.2}]}


def test_trees_hold_their_points_in_the_order_of_their_conversations(build, config):
    example, text = build(tree())
    ids, rows = example["input_ids"], example["point_target_ids"]
    tokenizer = config.build_tokenizer()
    tokens = np.flatnonzero(ids == tokenizer.point_token_ids[0])
    assert len(tokens) == len(rows) == 6
    groups = np.split(rows, np.flatnonzero(rows[:, 0] == NO_MORE_POINTS) + 1)[:-1]
    dogs = 0 if text.index(">dogs<") < text.index(">cats<") else 1
    assert [len(group) for group in groups] == ([4, 2] if dogs == 0 else [2, 4])
    close(found(config, {**example, "point_target_ids": groups[1 - dogs]}), [(0, 0.875, 0.1)])
    weights = {round(float(w), 4) for w in np.unique(example["loss_masks"][tokens - 1])}
    assert len(weights) == 2, "of each conversation its own"


def test_what_is_cut_off_takes_its_points_along(build, config):
    whole, _ = build({"image": "wide.png", "label": "dogs", "points": [[8, 6], [70, 55]]})
    tokenizer = config.build_tokenizer()
    first, second, third = (np.flatnonzero(whole["input_ids"] == token) for token in tokenizer.point_token_ids)
    rows = whole["point_target_ids"]
    for end, expected in (
        (first[1], [rows[0]]),
        (second[1], [rows[0], [rows[1, 0], -1, -1]]),
        (third[1], [rows[0], [*rows[1, :2], -1]]),
        (third[1] + 1, rows[:2]),
    ):
        cut, _ = build({"image": "wide.png", "label": "dogs", "points": [[8, 6], [70, 55]]}, int(end))
        assert cut["point_target_ids"].tolist() == np.array(expected).tolist()
        assert cut["metadata"]["truncation"]["dropped_tokens"] == len(whole["input_ids"]) - end


WRITTEN = '<points coords="1 1 875 917 2 100 100">dogs</points>'


@pytest.mark.parametrize("written", [WRITTEN, '<points x1="87.5" y1="91.7" x2="10" y2="10" alt="dogs">dogs</points>'])
def test_points_that_answers_write_become_tokens(build, config, written):
    """As Molmo and Molmo2 write them: the same example as of the points themselves."""
    given, text = build({"image": "wide.png", "question": "Where are they?", "label": "dogs", "points": [[70, 55], [8, 6]]})
    conversation = ["Where are they?", written, "And the cats?", "There are none."]
    example, turns = build({"image": "wide.png", "messages": conversation})
    assert example["point_target_ids"].tolist() == given["point_target_ids"].tolist()
    assert turns.startswith(text)
    assert build({"image": "wide.png", "question": "Where are they?", "answer": written})[1] == text
    assert written in build({"messages": conversation})[1], "without a picture they are text"


def test_written_points_of_several_images_and_times(build, config):
    answers = (
        '<points coords="1 1 100 100;2 2 500 500">cups</points>',
        'None but <tracks coords="0.0 1 100 900;1.0 1 600 400">ball</tracks>.',
    )
    example, text = build({"images": ["wide.png", "tall.png"], "messages": ["Where?", answers[0]]})
    close(found(config, example), [(0, 0.1, 0.1), (1, 0.5, 0.5)])
    example, text = build({"video": "clip.mp4", "messages": ["Track it.", answers[1]]})
    second = int(np.abs(np.array(example["metadata"]["frame_times"]) - 1).argmin())
    close(found(config, example), [(0, 0.1, 0.9), (second, 0.6, 0.4)])
    assert "assistant\nNone but <tracks coords=" in text


def test_a_conversation_goes_on_with_the_points_that_were_answered(config, folder):
    """What a client sends back of an answer is what the model had generated; what is nowhere stays text."""
    ask = config.build_preprocessor(for_inference=True)
    taught = config.build_preprocessor(for_inference=False, is_training=False)
    image = str(folder / "wide.png")
    prompt = ask({"image": image, "messages": ["Where?", WRITTEN, "And now?"]})
    example = taught({"image": image, "messages": ["Where?", WRITTEN, "And now?", "Yes."]})
    length = len(prompt["input_ids"])
    assert prompt["input_ids"].tolist() == example["input_ids"][:length].tolist()
    assert prompt["point_target_ids"].tolist() == example["point_target_ids"].tolist()
    nowhere = ask({"image": image, "messages": ["Where?", WRITTEN.replace("1 1", "7 1"), "And now?"]})
    assert "point_target_ids" not in nowhere


CLIP = {"video": "clip.mp4", "label": "ball", "point_scale": 100}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image": "wide.png", "label": "dogs", "points": [[8, 6], [90, 6]]}, r"point outside the image: \(112\.5 %, 10\.0 %\)"),
        ({"image": "wide.png", "label": "dogs", "points": [[1, 130]], "point_scale": 100}, "point outside the image.*point_scale=100"),
        ({"images": ["wide.png", "tall.png"], "label": "x", "question": "?", "image_points": [[], [[8, 95]]]}, "point outside the image"),
        ({"images": ["wide.png"], "label": "x", "question": "?", "image_points": [[], [[8, 9]]]}, "points in pixels need an image"),
        (
            {"images": ["wide.png"], "label": "x", "question": "?", "image_points": [[], [[8, 9]]], "point_scale": 100},
            "image 2, but there are 1",
        ),
        ({**CLIP, "timestamps": [90.0], "points": [[[10, 10]]]}, r"a point at 90 s, but the frames are from 0 to [\d.]+ s"),
        ({**CLIP, "timestamps": [0.0], "tracks": [{"a": [10, 210]}]}, "point outside the image"),
        ({"image": "wide.png", "messages": ["?", WRITTEN.replace("875", "1750")]}, r"1 point\(s\) outside the image in the tag of 'dogs'"),
        ({"image": "wide.png", "messages": ["?", WRITTEN.replace("1 1", "2 1")]}, "a point in image 2, but there are 1"),
        ({"image": "wide.png", "messages": ["\ufdd1?", WRITTEN]}, "characters that Unicode reserves"),
        ({"label": "dogs", "points": [[1, 2]], "point_scale": 100}, "there is no picture that it is about"),
    ],
)
def test_points_that_are_nowhere_are_rejected(build, fields, reason):
    with pytest.raises(Rejected, match=reason):
        build(fields)


def test_easy_vqa_with_points(tmp_path):
    """Coordinates in place of the written answer; a tokenizer for MolmoPoint knows the text around its points."""
    easy_vqa.write("test", tmp_path / "text.jsonl", 12)
    easy_vqa.write("test", tmp_path / "points.jsonl", 12, points=True)
    for text, points in zip(*((json.loads(line) for line in (tmp_path / f"{n}.jsonl").open()) for n in ("text", "points")), strict=True):
        assert text["message_list"][:-1] == points["message_list"][:-1]
        task = points["message_list"][-1]
        assert (task["points"], task["point_scale"], task["type"]) == ([text["metadata"]["point"]], 100, "pointing")
        assert "answer" not in task
    prepare = PrepareConfig(records="-", output="-", model="configs/models/demo-point.yaml", tokenizer=TokenizerTraining(400))
    tokenizer = model_for(tmp_path, prepare, open_records(str(tmp_path / "points.jsonl")), 12).build_tokenizer()
    assert len(tokenizer.encode(' <points coords="')) <= 4
