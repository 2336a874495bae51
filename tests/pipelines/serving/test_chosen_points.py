"""Answers of MolmoPoint through the chat service: clients see text with coordinates, and points as data, and need not know the model."""

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from molmo_core.model_configs.molmo_point import MolmoPointConfig
from molmo_core.preprocessing.point_tokens import MARKS, PointWriter
from pipelines.serving.chat import ChatService
from pipelines.serving.config import ServeConfig
from pipelines.serving.pieces import Piece
from tests.pipelines.serving.conftest import Scripted

SIZE = (80, 60)
GIVEN = np.array([[0.1, 0.2], [0.9, 0.8]])


@pytest.fixture(scope="module")
def config(golden):
    return MolmoPointConfig.load(golden / "molmo-point" / "a" / "config.yaml", ["data_formatter.debug=false"])


def pieces(config, text, rows):
    """What an engine gives for this answer, one token at a time."""
    tokenizer, column, row = config.build_tokenizer(), 0, -1
    result, run = [], ""
    for character in f"{text}\0":
        if character not in MARKS and character != "\0":
            run += character
            continue
        result += [Piece([token], None) for token in tokenizer.encode(run)]
        run = ""
        if character in MARKS:
            column = MARKS.index(character)
            row += column == 0
            result.append(Piece([tokenizer.point_token_ids[column]], None, places=[int(rows[row, column])]))
    return [*result, Piece([], "stop")]


def ask(config, stream):
    places = config.point_places({"image_sizes": [SIZE]})
    writer = PointWriter(config.point_style, places, np.random.RandomState(0))
    text = f"There are 2 {writer.points([(1, GIVEN)], 'dogs')}."
    parts = pieces(config, text, writer.taken())
    service = ChatService(ServeConfig(model="m", name="m"), config, lambda *_: Scripted(parts))
    buffer = io.BytesIO()
    Image.new("RGB", SIZE).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Point."}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "stream": stream}

    async def go():
        answer = await service.start(body)
        return [event async for event in answer.events()] if stream else await answer.whole()

    return asyncio.run(go()), len(parts) - 1


def check(text, points):
    assert text.startswith('There are 2 <points coords="1 1 ')
    assert text.endswith('">dogs</points>.')
    assert [(point["image"], point["label"], point["t"]) for point in points] == [(0, "dogs", None)] * 2
    for point, (x, y) in zip(sorted(points, key=lambda point: point["x"]), GIVEN):
        assert abs(point["x"] - x * SIZE[0]) < 4  # a third of a patch
        assert abs(point["y"] - y * SIZE[1]) < 4


def test_a_whole_answer(config):
    body, tokens = ask(config, stream=False)
    message = body["choices"][0]["message"]
    check(message["content"], message["points"])
    assert body["usage"]["completion_tokens"] == tokens


def test_a_streamed_answer(config):
    events, _ = ask(config, stream=True)
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-1]]
    check("".join(delta.get("content", "") for delta in deltas), [point for delta in deltas for point in delta.get("points", [])])
