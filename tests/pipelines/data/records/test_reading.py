"""Rows as people write them become examples; what is wrong with a row is said by field."""

from __future__ import annotations

import base64

import pytest

from pipelines.data.records.media import fetch
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record


def example(data, source="/data/set/records.jsonl"):
    return read_record(Record(source, 3, data))


USER = {"role": "user", "content": "What?"}
ASSISTANT = {"role": "assistant", "content": "That."}
QA = {"question": "What?", "answer": "That."}
TEXT = {"type": "text", "text": "What?"}
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
INLINE = {"type": "image", "image": "a.png"}


def test_plain_form():
    found = example({"image": "cat.jpg", "messages": [USER, ASSISTANT], "id": 7, "metadata": {"split": "a"}})
    assert found == {"image": "/data/set/cat.jpg", "messages": [USER, ASSISTANT], "metadata": {"split": "a", "id": 7}}
    assert example({"images": ["a.jpg", "/b.jpg"], "messages": ["What?", "That."]})["images"] == ["/data/set/a.jpg", "/b.jpg"]
    assert example({"messages": [USER, ASSISTANT]})["messages"] == [USER, ASSISTANT]


@pytest.mark.parametrize("source", ["s3://bucket/set/records.jsonl", "/data/set/records.jsonl"])
def test_media_are_relative_to_the_file(source):
    base = source.rpartition("/")[0]
    messages = [USER, ASSISTANT]
    assert example({"image": "i/cat.jpg", "messages": messages}, source)["image"] == f"{base}/i/cat.jpg"
    assert example({"image": "https://x.org/c.jpg", "messages": messages}, source)["image"] == "https://x.org/c.jpg"
    assert example({"image": b"bytes", "messages": messages}, source)["image"] == b"bytes"
    assert example({"image": {"bytes": b"x", "path": None}, "messages": messages}, source)["image"] == b"x"


def test_openai_parts():
    url = "data:image/png;base64," + base64.b64encode(b"png").decode()
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}, ASSISTANT]
    found = example({"messages": messages})
    assert found["messages"][0] == {"role": "user", "content": "Be brief.\nWhat?\nWhy?"}
    assert fetch(found["image"]) == b"png"
    placeholder = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, ASSISTANT]
    assert example({"messages": placeholder, "image": "x.png"})["image"] == "/data/set/x.png"
    video = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "v.mp4"}}, {"type": "text", "text": "?"}]}, ASSISTANT]
    assert example({"messages": video})["video"] == "/data/set/v.mp4"


def test_llava_conversations():
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    assert example({"image": "a/b.jpg", "conversations": turns})["messages"] == [USER, ASSISTANT]
    assert example({"video": "v.mp4", "conversations": turns})["messages"] == [USER, ASSISTANT]  # as LLaVA-Video writes it


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (
            {"caption": "A cat.", "transcripts": ["um a cat"]},
            {"message_list": [{"style": "long_caption", "text": "A cat."}, {"style": "transcript", "text": "um a cat"}]},
        ),
        (
            {"caption": "A cat.", "transcripts": ["um", "a cat"]},
            {"message_list": [{"style": "long_caption", "text": "A cat."}, {"style": "transcript", "text": ["um", "a cat"]}]},
        ),
        (
            {"label": "cats", "points": [{"x": 10, "y": 20.5}], "collection_method": "pointing"},
            {"style": "pointing", "label": "cats", "points": [[10.0, 20.5]], "point_scale": 100},
        ),
        (
            {"label": "cats", "points": [], "count": 0, "collection_method": "counting"},
            {"style": "point_count", "label": "cats", "points": [], "point_scale": 100},
        ),
        (
            {"label": "cats", "points": {"x": [10, 30], "y": [20.5, 40]}, "count": 2},
            {"style": "point_count", "label": "cats", "points": [[10.0, 20.5], [30.0, 40.0]]},
        ),
        ({"label": "cats", "count": 3.0}, {"style": "demo", "question": "How many cats are there?", "answer": "3"}),
        ({"label": "cats", "points": None, "count": 2}, {"style": "demo", "question": "How many cats are there?", "answer": "2"}),
        ({"question": "Why?", "answer": "So."}, {"style": "demo", "question": "Why?", "answer": "So."}),
        ({"label": "x", "question": "Why?", "answer": "So."}, {"style": "demo", "question": "Why?", "answer": "So."}),
        ({"question": "[USER] Why? [ASSISTANT]", "answer": "So."}, {"style": "demo", "question": "Why?", "answer": "So."}),
        (
            {"question": "[USER] Why? [ASSISTANT] So. [USER] What? [ASSISTANT]", "answer": "That."},
            {"style": "demo", "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}, USER, ASSISTANT]},
        ),
        (
            {"question": "Who?", "options": ["a", "b"], "answer_idx": 1},
            {"style": "demo", "question": "Who?", "options": ["a", "b"], "answer_idx": 1},
        ),
    ],
    ids=[
        "cap", "cap with transcripts", "points", "count with points", "count with pixels", "count", "count without points",
        "ask-model-anything", "question with a label", "cap-qa", "cap-qa of two turns", "multiple choice",
    ],
)  # fmt: skip
def test_pixmo_rows(row, task):
    found = example({"image_url": "https://x.org/1.jpg", "image_sha256": "0", **row})
    assert found == {**task, "image": "https://x.org/1.jpg", "metadata": {}}


def test_video_questions():
    row = {"video": "v.mp4", "question": "Who?", "options": ["a", "b"], "answer_idx": 1, "start": 2.0, "end": 5.5}
    found = example({**row, "style": "video_multiple_choice"})
    assert (found["video"], found["clip_start"], found["clip_end"]) == ("/data/set/v.mp4", 2.0, 5.5)
    assert found["answer_idx"] == 1
    nested = example({"video": {"path": "v.mp4", "start": 1}, "question": "Who?", "answer": "Me"})
    assert (nested["video"], nested["clip_start"]) == ("/data/set/v.mp4", 1)


def test_subtitles_are_counted_from_the_start_of_the_clip():
    lines = [{"start": k, "end": k + 1.5, "text": str(k)} for k in range(8)]
    row = {"video": "v.mp4", "question": "Who?", "answer": "Me", "subtitles": lines}
    assert example(row)["subtitle"] == lines
    assert example({**row, "start": 2.5, "end": 4.2})["subtitle"] == [
        {"start": 0, "end": 1.0, "text": "2"},
        {"start": 0.5, "end": 1.7, "text": "3"},
        {"start": 1.5, "end": 1.7, "text": "4"},
    ]
    assert "subtitle" not in example({**row, "start": 20})


def test_media_of_parts_and_other_fields():
    def asking(*parts):
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?", "image": None}]}, ASSISTANT]

    table = {"type": "image", "image": None, "url": "0.png", "text": None}  # a row of Parquet has all fields of all parts
    assert example({"messages": asking(table)})["image"] == "/data/set/0.png"
    assert example({"messages": asking({"type": "image"}, {"type": "image"}), "images": ["a", "b"]})["images"] == [
        "/data/set/a",
        "/data/set/b",
    ]
    assert example({"videos": ["v.mp4"], "messages": ["<video>What?", "That."]})["messages"] == [USER, ASSISTANT]
    assert example({"image": "a", "messages": [{**USER, "content": "<image>\nWhat?"}, ASSISTANT]})["messages"] == [USER, ASSISTANT]
    html = {"role": "assistant", "content": "<video src='a'>, <image>"}
    assert example({"messages": [USER, html]})["messages"][1] == html  # an answer is left as it is


def test_all_fields_of_tasks_are_passed_on():
    lettered = {"question": "Who?", "options": ["a", "b"], "option_names": ["1", "2"], "answer_idx": 1.0}
    found = example({"image": "a", **lettered})
    assert {k: found[k] for k in lettered} == lettered
    assert type(found["answer_idx"]) is int
    for task in (
        {"label": "x", "timestamps": [0.5], "points": [[[1, 2]]], "point_scale": 100},
        {"label": "x", "timestamps": [0.5], "tracks": [{"a": [1, 2], "b": None}]},
        {"label": "x", "image_points": [[[1, 2]], []]},
    ):
        found = example({"video": "v.mp4", "style": "pointing", **task})
        assert {k: found[k] for k in task} == task


def test_captions_and_bare_questions():
    assert example({"image": "a.jpg", "caption": "A cat."}) == {
        "style": "long_caption",
        "text": "A cat.",
        "image": "/data/set/a.jpg",
        "metadata": {},
    }
    assert example({"image": "a.jpg", "question": "Q?", "answer": "A"})["style"] == "demo"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a", "messages": [{"role": "user"}]}, r"messages\[0\]: needs role and content"),
        ({"image": "a", "messages": [USER, {"role": "robot", "content": "x"}]}, r"messages\[1\]: role 'robot' is none of user"),
        ({"image": "a", "messages": [USER, USER]}, "turn 1 is of user"),
        (
            {"image": "a", "messages": [{"role": "user", "content": [{"type": "audio"}]}, ASSISTANT]},
            r"messages\[0\].content\[0\]: type 'audio'",
        ),
        ({"image": "a", "video": "b", "messages": [USER, ASSISTANT]}, "image, video: give only one of them"),
        ({"images": [], "messages": [USER, ASSISTANT]}, "images: a list with at least one image"),
        ({"images": ["a", 3], "messages": [USER, ASSISTANT]}, r"images\[1\]: a path, a URL or bytes is needed, found int"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: needs from and value"),
        ({"image_url": "x", "points": [{"x": 1}], "label": "l"}, r"points: a list of \[x, y\] .*, a list of {x, y} \(percent"),
        ({"image_url": "x", "points": {"x": [1, 2], "y": [1]}, "label": "l"}, "bad points: points"),
        ({"image_url": "x", "points": [], "label": "l", "count": 2}, "bad points: count is 2, but there are 0 points"),
        ({"image_url": "x", "label": "l", "count": "two"}, "count: a whole number is needed, found 'two'"),
        ({"image_url": "x", "caption": "A cat.", "transcripts": "um"}, "transcripts: a list of texts is needed, found 'um'"),
        ({"image_url": "x", "question": "?", "parsed_response": "<|POINT|>", "points": [[[1, 2]]]}, "not supported: an answer that points"),
        ({"image_url": "x", "question": "[USER] a [USER] b", "answer": "c"}, r"\[USER\] and \[ASSISTANT\] take turns"),
        ({"image_url": "x", "license": "y"}, r"fields: \['image_url', 'license'\]"),
        ({"message_list": ["x"]}, r"message_list\[0\]: an object is needed, found str"),
        ({"image": "a"}, "none of messages, conversations"),
        ({"messages": [USER, ASSISTANT], "metadata": "train"}, "metadata: an object is needed, found 'train'"),
        ({"messages": [USER, ASSISTANT], "id": "\ud800"}, "id: not valid Unicode"),
        ({"messages": [USER, ASSISTANT], "metadata": {"a": ["\ud800"]}}, r"metadata.a\[0\]: not valid Unicode"),
        ({"messages": [{**USER, "content": "\ud800"}, ASSISTANT]}, r"bad field: messages\[0\].content: not valid Unicode"),
        ({"message_list": [QA, {**QA, "answer": "\udfff"}]}, r"message_list\[1\].answer: not valid Unicode"),
        ({"messages": [{**USER, "role": ["user"]}, ASSISTANT]}, r"messages\[0\]: role \['user'\] is none of"),
        # media that would be lost
        (
            {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]},
            "1 <image> placeholder, 0 images",
        ),
        ({"image": "a", "messages": ["<image><image>What?", "That."]}, "record: media do not match: 2 <image> placeholders, 1 image$"),
        ({"images": ["a", "b"], "messages": ["<image>What?", "That."]}, "1 <image> placeholder, 2 images"),
        ({"image": "a", "messages": ["<video>What?", "That."]}, "1 <video> placeholder, 0 videos"),
        ({"messages": [{**USER, "content": [{"type": "image"}, TEXT]}, ASSISTANT]}, "1 <image> placeholder, 0 images"),
        ({"messages": [{**USER, "content": [{"type": "image"}, INLINE, TEXT]}, ASSISTANT]}, "2 <image> placeholders, 1 image"),
        ({"messages": [{**USER, "content": [INLINE, TEXT]}, ASSISTANT], "image": "b"}, "image in messages, but also image beside them"),
        ({"messages": [{**USER, "content": [INLINE, TEXT]}, ASSISTANT], "image_url": "b"}, "but also image_url beside them"),
        ({"videos": ["a", "b"], **QA}, "videos: a list of one video is needed"),
        ({"video": "a", "audio": "b", **QA}, "audio: sound is not read"),
        ({"image": "a", "subtitles": [{"start": 0, "end": 1, "text": "x"}], **QA}, "subtitles: there is no video"),
        # values of fields
        ({"image": "a", "question": "?", "answer": ""}, "answer must be a string that is not empty, a number"),
        ({"image": "a", "question": "?", "answer": {"a": 1}}, r"answer must be .*, got {'a': 1}"),
        ({"image": "a", "question": "?", "options": "xy", "answer_idx": 0}, "options must be a non-empty list of strings, got 'xy'"),
        (
            {"image": "a", "question": "?", "options": ["a", "b"], "answer_idx": "B"},
            "answer_idx must be the number of an option, from 0, got 'B'",
        ),
        ({"image": "a", "question": "?", "options": ["a", "b"], "answer_idx": 0.5}, "answer_idx must be"),
        ({"image": "a", **QA, "weight": "a"}, "weight must be a number, 0 or more, got 'a'"),
        ({"image": "a", **QA, "weight": -1}, "weight must be"),
        ({"image": "a", **QA, "weight": 10**400}, "weight must be"),
        ({"image": "a", **QA, "weight": float("nan")}, "weight must be"),
        ({"image": "a", "message_list": [QA, {**QA, "weight": float("inf")}]}, r"message_list\[1\].weight must be .*, got inf"),
        ({"image": "a", "message_list": [QA, {"label": "x", "points": [{"x": 1}]}]}, r"message_list\[1\].points: a list of \[x, y\]"),
        ({"message_list": [{"messages": ["a", 3]}]}, r"message_list\[0\].messages\[1\]: a text or an object is needed, found 3"),
        ({"message_list": [QA, {"question": "?"}]}, r"no answer: message_list\[1\]: none of answer"),
        ({"video": "a", **QA, "start": "5"}, "start: a number of seconds is needed, found '5'"),
        ({"video": {"path": "a", "start": -1}, **QA}, "video.start: a number of seconds"),
        ({"video": "a", **QA, "start": 5, "end": 3}, "end: 3 s is not after the start, 5 s"),
        (
            {"video": "a", **QA, "subtitles": [{"start": "00:01", "end": 2, "text": "x"}]},
            r"subtitles\[0\].start: a number of seconds is needed, found '00:01'",
        ),
    ],
)
def test_mistakes_name_the_field(row, message):
    with pytest.raises(Rejected, match=message):
        example(row)


def test_what_nobody_thought_of_costs_one_row():
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(Rejected, match="record: cannot be read: RecursionError"):
        example({"messages": [USER, ASSISTANT], "metadata": deep})


def test_files_on_any_filesystem(tmp_path):
    import fsspec

    with fsspec.open("memory://set/x.bin", "wb") as file:
        file.write(b"remote")
    assert fetch("memory://set/x.bin") == b"remote"
    (tmp_path / "y.bin").write_bytes(b"local")
    assert fetch(f"file://{tmp_path}/y.bin") == str(tmp_path / "y.bin")
    with pytest.raises(Rejected, match="missing file"):
        fetch("memory://set/none.bin")
    with pytest.raises(Rejected, match="unreadable URL"):
        fetch("nosuchprotocol://x/y")
