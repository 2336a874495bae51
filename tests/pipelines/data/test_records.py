"""Rows as people write them become examples; what is wrong with a row is said by field."""

from __future__ import annotations

import base64

import pytest

from pipelines.data.media import fetch
from pipelines.data.records import normalise
from pipelines.data.sources import Record, Rejected


def example(data, source="/data/set/records.jsonl"):
    return normalise(Record(source, 3, data))


USER = {"role": "user", "content": "What?"}
ASSISTANT = {"role": "assistant", "content": "That."}


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


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (
            {"caption": "A cat.", "transcripts": ["um a cat"]},
            {"message_list": [{"style": "long_caption", "text": "A cat."}, {"style": "transcript", "text": "um a cat"}]},
        ),
        (
            {"label": "cats", "points": [{"x": 10, "y": 20.5}], "collection_method": "pointing"},
            {"style": "pointing", "label": "cats", "points": [[10.0, 20.5]], "point_scale": 100},
        ),
        (
            {"label": "cats", "points": [], "count": 0, "collection_method": "counting"},
            {"style": "point_count", "label": "cats", "points": [], "point_scale": 100},
        ),
        ({"label": "cats", "count": 3}, {"style": "demo", "question": "How many cats are there?", "answer": "3"}),
        ({"question": "Why?", "answer": "So."}, {"style": "demo", "question": "Why?", "answer": "So."}),
    ],
    ids=["cap", "points", "count with points", "count", "ask-model-anything"],
)
def test_pixmo_rows(row, task):
    found = example({"image_url": "https://x.org/1.jpg", "image_sha256": "0", **row})
    assert {k: found[k] for k in task} == task
    assert found["image"] == "https://x.org/1.jpg"


def test_video_questions():
    row = {"video": "v.mp4", "question": "Who?", "options": ["a", "b"], "answer_idx": 1, "start": 2.0, "end": 5.5}
    found = example({**row, "style": "video_multiple_choice", "subtitles": [{"start": 0, "end": 1, "text": "Hi"}]})
    assert (found["video"], found["clip_start"], found["clip_end"]) == ("/data/set/v.mp4", 2.0, 5.5)
    assert found["subtitle"] == [{"start": 0, "end": 1, "text": "Hi"}]
    assert found["answer_idx"] == 1
    nested = example({"video": {"path": "v.mp4", "start": 1}, "question": "Who?", "answer": "Me"})
    assert (nested["video"], nested["clip_start"]) == ("/data/set/v.mp4", 1)


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
        ({"image": "a", "video": "b", "messages": [USER, ASSISTANT]}, "one of image, video"),
        ({"images": [], "messages": [USER, ASSISTANT]}, "images: a list with at least one image"),
        ({"images": ["a", 3], "messages": [USER, ASSISTANT]}, r"images\[1\]: a path, a URL or bytes is needed, found int"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: needs from and value"),
        ({"image_url": "x", "points": [{"x": 1}], "label": "l"}, "points: objects with x and y"),
        ({"image_url": "x", "license": "y"}, r"fields: \['image_url', 'license'\]"),
        ({"message_list": ["x"]}, r"message_list\[0\]: an object is needed, found str"),
        ({"image": "a"}, "none of messages, conversations"),
    ],
)
def test_mistakes_name_the_field(row, message):
    with pytest.raises(Rejected, match=message):
        example(row)


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
