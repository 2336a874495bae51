"""Every field of a row is used, counted by name, or rejects the row by name."""

from __future__ import annotations

import base64
import copy
import io
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 200, 9)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = picture()
MP4 = b"\0\0\0\x18ftypmp42\0\0\0\0"
QA = {"question": "What colour is it?", "answer": "Green."}
TURNS = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "That."},
]
ROWS = [
    {"image": PNG, **QA},
    {"messages": ["How are you?", "Well."]},
    {"messages": TURNS},
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]},
    {"image": "a.png", "message_list": [QA, {"label": "cat", "points": [{"x": 1.0, "y": 2.0}], "point_scale": 100}]},
    {"image_url": "a.png", "label": "cat", "points": [{"x": 1.0, "y": 2.0}], "collection_method": "pointing"},
    {"image": "a.png", "question": "Who?", "options": ["a cat", "a dog"], "answer": "a dog"},
    {"video": {"path": "v.mp4", "start": 1}, **QA, "subtitles": [{"start": 0, "end": 2, "text": "Hello."}]},
    {"image": "a.png", "caption": "A cat."},
]


def read(data):
    counts: Counter[str] = Counter()
    return read_record(Record("/set/r.jsonl", 0, data), counts), counts


def read_or_reason(data):
    try:
        return (*read(data), "")
    except Rejected as reason:
        return None, None, str(reason)


def objects(value, found):
    """All objects in a row but those that may hold anything."""
    if isinstance(value, dict):
        found.append(value)
        for name, item in value.items():
            if name != "metadata":
                objects(item, found)
    elif isinstance(value, list):
        for item in value:
            objects(item, found)
    return found


MARK = "zqxj"
NAMES = st.one_of(
    st.sampled_from([
        "system", "choices", "loss", "train", "mask", "hint", "image_1", "screenshot", "file_name", "url", "source", "split", "licence",
        "score", "language", "thumbnail", "jpg", "A", "answer_type", "question_id", "passage", "weight", "name", "id_", "start",
        "video_file", "audio",
    ]),
    st.text("abcdefgimoptx_", min_size=1, max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(
        st.just(f"{MARK}"), st.just(f"{MARK} of several words"), st.just(f"{MARK}.png"), st.just(f"{MARK}.mp4"), st.just(73.25),
        st.just(True), st.just(PNG), st.just(""), st.just("data:image/png;base64," + base64.b64encode(PNG).decode()),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["x", "bytes", "path"]), inner, max_size=2)),
    max_leaves=3,
)  # fmt: skip


@given(data=st.data(), row=st.sampled_from(ROWS), field=NAMES, value=VALUES)
@settings(max_examples=300, deadline=None)
def test_any_field_anywhere_is_used_counted_or_rejects_its_row(data, row, field, value):
    plain, before = read(copy.deepcopy(row))
    assert not before
    changed = copy.deepcopy(row)
    target = data.draw(st.sampled_from(objects(changed, [])))
    assume(field not in target and field != "metadata")
    target[field] = value
    found, counts, reason = read_or_reason(changed)
    if found is None:
        assert reason.startswith("record: ")
        assert "cannot be read" not in reason
        # By its own name, or by that of the field beside which it cannot stand.
        assert field in reason or "placeholder" in reason or "beside them" in reason or any(f"{name}:" in reason for name in row), reason
    elif found == plain:  # of no effect: then it is counted, or it says what is the case anyway
        says_so = (field in ("weight", "loss", "train") and value is True) or field in ("path", "url", "bytes")
        assert any(name.rpartition(".")[2] == field for name in counts) or says_so or value == "", (field, value)
        assert not isinstance(value, bytes)


TEXT = {"messages": ["How are you?", "Well."]}


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"image_1": PNG}, "image"),
        ({"screenshot": {"bytes": PNG, "path": "a.png"}}, "image"),
        ({"jpg": PNG}, "image"),
        ({"img": "a"}, "image"),
        ({"img_path": "a.png"}, "image"),
        ({"file_name": "a.png"}, "image"),
        ({"imgs": ["a.png"]}, "image"),
        ({"whatever": "https://example.org/a.JPG?size=3"}, "image"),
        ({"x1": "data:image/webp;base64,AAAA"}, "image"),
        ({"image_base64": base64.b64encode(PNG).decode()}, "image"),
        ({"jpg": PNG, "url": "https://example.org/a.jpg", "image_id": 3}, "image"),
        ({"video_file": "a.mp4"}, "video"),
        ({"movie_path": "a.webm"}, "video"),
        ({"mp4": MP4}, "video"),
        ({"videoPath": "a"}, "video"),
    ],
)
@pytest.mark.parametrize("row", [QA, TEXT], ids=["question", "chat"])
def test_media_are_found_under_any_name(row, fields, key):
    assert key in read({**row, **fields})[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_1": PNG, "image_2": PNG}, "image_1, image_2: which of them is asked about"),
        ({"thumbnail": PNG}, "thumbnail: is this the image that is asked about"),
        ({"mask_image": "a.png"}, "mask_image: is this the image"),
        ({"url": "https://example.org/a.jpg"}, "url: is this the image"),
        ({"frames": ["a.jpg", "b.jpg"]}, "frames: of several images the order counts"),
        ({"annotations": {"deep": [{"file": "a.png"}]}}, "annotations"),
        ({"pixels": np.zeros((4, 4, 3), np.uint8)}, "pixels: is this the image"),
        ({"image_id": 5}, "image_id speaks of an image, but the record has none"),
        ({"video_id": "x7"}, "video_id speaks of a video, but the record has none"),
        ({"metadata": {"from": ["a.png"]}}, "metadata.from: holds or names an image"),
        ({"id": "set/1.jpg"}, "id: holds or names an image"),
        ({"audio_path": "a.wav"}, "audio_path: sound is not read"),
        ({"x": b"RIFF\0\0\0\0WAVEfmt "}, "x: sound is not read"),
        ({"image": PNG, "image_2": PNG}, "image_2: this image is not read beside the others"),
        ({"image": PNG, "depth": "d.png"}, "depth: this image is not read"),
        ({"image": PNG, "mask_path": "d.png"}, "mask_path: this image is not read"),
        ({"image": PNG, "video_path": "v.mp4"}, "video_path: this video is not read"),
        ({"image": "a.png", "all_images": ["a.png", "b.png"]}, "all_images: this image is not read"),
    ],
)
def test_media_that_would_be_lost_reject_the_row(fields, message):
    with pytest.raises(Rejected, match=re.escape(message)):
        read({**QA, **fields})


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("loss", False, "write weight"),
        ("sample_weight", 0.5, "write weight"),
        ("mask", "User", "write weight"),
        ("instruction", "Be brief.", "write system"),
        ("distractors", ["a"], "write options and answer_idx"),
        ("option_a", "cat", "write options and answer_idx"),
        ("B", "cat", "write options and answer_idx"),
        ("gold", "x", "write it as answer"),
        ("text", "x", "write several as a message_list"),
        ("language", "de", "write it into the question"),
        ("context", "x", "write it into the question"),
        ("bbox", [1, 2, 3, 4], "write it into the question"),
        ("foo", "a text of several words", "move it into metadata"),
        ("foo", {"a": 1}, "move it into metadata"),
    ],
)
def test_what_may_change_the_meaning_rejects_the_row(field, value, advice):
    with pytest.raises(Rejected, match=f"unread field: {field}: not read, and it may change the meaning; .*{advice}"):
        read({"image": PNG, **QA, field: value})


def test_what_describes_the_record_is_counted():
    fields = {
        "split": "train", "licence": "CC BY 4.0", "source": "coco 2014", "question_id": 7, "answer_type": "yes/no", "url": "https://x.org/a",
        "file_name": "a.png", "height": 480, "difficulty": "hard", "created_at": "2024-01-01 10:00:00", "foo": 3, "bar": "baz",
        "codes": [1, "b"], "system": "", "hint": [], "num_answers": 3, "label": 2, "meta": {"annotator": "a b"},
    }  # fmt: skip
    row = {"image": PNG, **QA}
    found, counts = read({**row, **fields})
    assert found == read(row)[0]
    assert counts == dict.fromkeys(fields.keys() - {"system"}, 1)
    _, counts = read({"image": PNG, "message_list": [{**QA, "label": 2, "split": "train"}] * 3})
    assert counts == {"message_list[].label": 3, "message_list[].split": 3}, "one name, however many annotations there are"


def test_fields_of_turns_parts_and_points():
    turns = copy.deepcopy(TURNS)
    turns[0]["content"][0]["detail"] = "high"
    turns[1] |= {"id": 3, "tool_calls": []}
    assert read({"messages": turns})[1] == {"messages[].content[].detail": 1, "messages[].id": 1, "messages[].tool_calls": 1}
    for place, name in (((0, "content", 1), "weight"), ((1,), "reasoning_content"), ((0,), "images"), ((1,), "foo")):
        turns = copy.deepcopy(TURNS)
        target = turns
        for step in place:
            target = target[step]
        target[name] = 3
        with pytest.raises(Rejected, match=rf"messages\[{place[0]}\].*{name}: "):
            read({"messages": turns})
    with pytest.raises(Rejected, match=r"points\[1\].t: not read"):
        read({"image": PNG, "label": "cat", "points": [{"x": 1, "y": 2}, {"x": 1, "y": 2, "t": 0.5}]})
    with pytest.raises(Rejected, match=r"message_list\[0\].hint: not read"):
        read({"image": PNG, "message_list": [{**QA, "hint": "x"}]})


@pytest.mark.parametrize(
    ("task", "needs"),
    [
        ({"caption": "A cat."}, "an image or a video"),
        ({"style": "transcript", "text": "so a cat"}, "an image or a video"),
        ({"style": "vqa2", **QA}, "an image or a video"),
        ({"message_list": [QA, {"style": "long_caption", "text": "A cat."}]}, "an image or a video"),
        ({"style": "cosyn_point", "question": "Where?", "answer": "There."}, "an image or a video"),
        ({"style": "point_count", "message_list": [{"question": "?", "answer": "3"}]}, "an image or a video"),
        ({"style": "pointing", "messages": ["Where?", "There."]}, "an image or a video"),
        ({"style": "video_short_caption", "text": "A cat.", "image": "a.png"}, "a video"),
        ({"style": "llava_video_mc", **QA}, "a video"),
    ],
)
def test_styles_that_cannot_be_without_media(task, needs):
    with pytest.raises(Rejected, match=f"no medium: style '.*' needs {needs}"):
        read(task)
    assert read({**{k: v for k, v in task.items() if k != "image"}, "video": "v.mp4"})[0]["video"] == "/set/v.mp4"


def test_points_without_their_picture():
    for row in ({"label": "cups", "count": 3}, {"label": "cups", "points": [[1, 2]], "point_scale": 100}, {"transcripts": ["so a cat"]}):
        with pytest.raises(Rejected, match="no medium: there is no picture that it is about: write image"):
            read(row)
