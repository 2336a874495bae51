"""Points of answers as data, however the text is cut."""

import asyncio
import base64
import functools
import io
import json

import pytest
from openai.lib.streaming._deltas import accumulate_delta
from PIL import Image

from pipelines.serving.pieces import Piece
from pipelines.serving.points import PointReader

V1 = 'It is <point x="50.0" y="25.0" alt="a cat">a cat</point> and <points x1="0.0" y1="0.0" x2="100" y2="10" alt="dogs">dogs</points>.'
V2 = 'Two: <points coords="1 1 500 250;2 2 100 900">cups</points>'
VIDEO = '<tracks coords="0.0 1 250 500;1.5 1 300 500">car</tracks>'


def cut(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


def read(metadata, text, size):
    """The points, and after how many characters each was told."""
    reader, told, seen = PointReader(metadata), [], 0
    for part in cut(text, size):
        seen += len(part)
        told += [(seen, point) for point in reader.push(part)]
    return told


@pytest.mark.parametrize("size", [1, 2, 7, 40, 1000])
def test_points_in_pixels(size):
    told = read({"image_sizes": [(640, 400)]}, V1, size)
    assert [point for _, point in told] == [
        {"image": 0, "x": 320.0, "y": 100.0, "label": "a cat", "t": None},
        {"image": 0, "x": 0.0, "y": 0.0, "label": "dogs", "t": None},
        {"image": 0, "x": 640.0, "y": 40.0, "label": "dogs", "t": None},
    ]
    closed = [V1.index("</point>") + 8, *[V1.index("</points>") + 9] * 2]
    assert all(0 <= seen - end < size for (seen, _), end in zip(told, closed)), "as soon as the tag is complete"


@pytest.mark.parametrize("size", [1, 1000])
def test_points_on_several_pictures(size):
    points = [point for _, point in read({"image_sizes": [(100, 100), (1000, 500)]}, V2, size)]
    assert [(point["image"], point["x"], point["y"]) for point in points] == [(0, 50.0, 25.0), (1, 100.0, 450.0)]
    assert len(read({"image_sizes": [(100, 100)]}, V2, size)) == 1, "there is no second picture"
    assert not read({"image_sizes": [(100, 100), (10, 10)]}, V1, size), "nobody knows on which"


def test_points_in_a_video():
    points = [point for _, point in read({"video_size": (200, 100), "frame_times": [0.0, 1.5]}, VIDEO, 3)]
    assert points == [
        {"image": 0, "x": 50.0, "y": 50.0, "label": "car", "t": 0.0},
        {"image": 0, "x": 60.0, "y": 50.0, "label": "car", "t": 1.5},
    ]


def test_text_without_pictures_has_no_points():
    assert read({}, V1, 5) == []


def test_the_reader_keeps_little():
    reader = PointReader({"image_sizes": [(10, 10)]})
    for _ in range(5000):
        assert reader.push("</point> many words > and <b> ") == []
        assert len(reader._text) < 100


def answers(scripted, text, stream):
    service, _ = scripted()
    tokens = service._tokenizer.encode(text)
    service, _ = scripted(*(Piece([token], None) for token in tokens), Piece([], "stop"))
    buffer = io.BytesIO()
    Image.new("RGB", (640, 400)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Point."}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "stream": stream}

    async def go():
        answer = await service.start(body)
        return [event async for event in answer.events()] if stream else await answer.whole()

    return service, asyncio.run(go())


def test_points_of_an_answer(scripted):
    service, body = answers(scripted, V1, stream=False)
    message = body["choices"][0]["message"]
    assert message["content"] == V1
    assert [(point["x"], point["y"]) for point in message["points"]] == [(320.0, 100.0), (0.0, 0.0), (640.0, 40.0)]
    turns = [{"role": "user", "content": "Point."}, message, {"role": "user", "content": "Sure?"}]
    assert asyncio.run(service.start({"model": "m", "messages": turns})), "the message is taken back"
    _, body = answers(scripted, "There are none.", stream=False)
    assert "points" not in body["choices"][0]["message"]


def test_points_of_a_streamed_answer(scripted):
    _, events = answers(scripted, V1, stream=True)
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-1]]
    text, points = "", []
    for delta in deltas:
        text += delta.get("content", "")
        for point in delta.get("points", []):
            points.append(point["x"])
            assert text.endswith(("</point>", "</points>")) or "</point" in delta["content"]
    assert (text, points) == (V1, [320.0, 0.0, 640.0])
    joined = functools.reduce(accumulate_delta, deltas, {})
    assert [(point["index"], point["x"]) for point in joined["points"]] == [(0, 320.0), (1, 0.0), (2, 640.0)]
