"""OpenAI's responses, without HTTP: what is taken, and the sequence of events."""

import asyncio
import base64
import io
import json

import pytest
from PIL import Image

from molmo_core.generation.engine.requests import Grammar, TokenLogprobs
from pipelines.serving.api.fields import read
from pipelines.serving.api.responses import ResponsesRequest
from pipelines.serving.errors import ApiError
from pipelines.serving.pieces import Piece


def request(**fields):
    return {"model": "m", "input": "What is it?", **fields}


def picture(width=640, height=400):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return {"type": "input_image", "image_url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


def respond(service, **fields):
    """The body, or the events of a stream."""

    async def go():
        answer = await service.respond(request(**fields))
        if not answer.streamed:
            return await answer.whole()
        await answer.begin()
        return [event async for event in answer.events()]

    return asyncio.run(go())


def says(scripted, text, end="stop", error=None):
    service, _ = scripted()
    tokens = service._tokenizer.encode(text)
    pieces = [Piece([token], None, [TokenLogprobs(-1.0, [(token, -1.0)])]) for token in tokens]
    return scripted(*pieces, error or Piece([], end))


def test_a_whole_answer(scripted):
    service, asked = says(scripted, "on the mat")
    body = respond(service, temperature=0.5, seed=3, max_output_tokens=9, metadata={"a": "b"})
    (item,) = body["output"]
    assert item["content"] == [{"type": "output_text", "text": "on the mat", "annotations": [], "logprobs": item["content"][0]["logprobs"]}]
    assert (body["status"], item["status"], body["error"], body["incomplete_details"]) == ("completed", "completed", None, None)
    assert (body["temperature"], body["metadata"], body["store"]) == (0.5, {"a": "b"}, False)
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + body["usage"]["output_tokens"] > 3
    params = asked[0][0][1]
    assert (params.temperature, params.seed, params.max_tokens, params.logprobs) == (0.5, 3, 9, None)


def test_an_answer_that_is_cut_off_says_so(scripted):
    body = respond(says(scripted, "on the", end="length")[0])
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def events_of(lines):
    """The data of events whose names and numbers are right."""
    bodies = []
    for number, line in enumerate(lines):
        name, data = line.removesuffix("\n\n").split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        assert body["sequence_number"] == number
        bodies.append(body)
    return bodies


def test_the_events_of_a_stream(scripted):
    events = events_of(respond(says(scripted, "on the mat")[0], stream=True, include=["message.output_text.logprobs"]))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    deltas = events[4:-4]
    assert {event["type"] for event in deltas} == {"response.output_text.delta"}
    assert "".join(event["delta"] for event in deltas) == events[-4]["text"] == "on the mat"
    told = [entry for event in deltas for entry in event["logprobs"]]
    assert "".join(entry["token"] for entry in told) == "on the mat"
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert events[-2]["item"]["content"] == [events[-3]["part"]]
    assert events[-3]["part"]["logprobs"] == told
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    assert len({event["item_id"] for event in events if "item_id" in event} | {events[2]["item"]["id"]}) == 1


def test_a_stream_that_fails(scripted):
    events = events_of(respond(says(scripted, "on the", error=ApiError(503, "lost", None, "replica_lost"))[0], stream=True))
    assert [event["type"] for event in events[-2:]] == ["response.failed", "error"]
    assert events[-2]["response"]["error"] == {"code": "replica_lost", "message": "lost"}
    assert events[-1]["error"]["message"] == "lost"


def test_pictures_and_points(scripted):
    service, asked = says(scripted, 'A <point x="50.0" y="25.0" alt="cat">cat</point>.')
    question = {"role": "user", "content": [picture(), {"type": "input_text", "text": "Point to the cat."}]}
    part = respond(service, input=[question])["output"][0]["content"][0]
    assert part["points"] == [{"image": 0, "x": 320.0, "y": 100.0, "label": "cat", "t": None}]
    assert "images" in asked[0][0][0]
    service, _ = says(scripted, 'A <point x="50.0" y="25.0" alt="cat">cat</point>.')
    events = events_of(respond(service, input=[question], stream=True))
    assert [point for event in events for point in event.get("points", [])] == part["points"]


def test_the_own_output_is_taken_back(scripted):
    service, asked = says(scripted, "on the mat")
    item = respond(service, include=["message.output_text.logprobs"])["output"][0]
    respond(service, input=[{"role": "user", "content": "What is it?"}, item, {"type": "message", "role": "user", "content": "Sure?"}])
    prompt = service._tokenizer.decode(asked[-1][0][0]["input_ids"], truncate_at_eos=False)
    assert "on the mat" in prompt
    assert "Sure?" in prompt


def test_forms():
    schema = {"type": "object"}
    flat = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    assert read(ResponsesRequest, request(text={"format": flat})).grammar == Grammar("json_schema", json.dumps(schema))
    assert read(ResponsesRequest, request(text={"format": {"type": "json_object"}})).grammar is not None
    assert read(ResponsesRequest, request(text={"format": {"type": "text"}, "verbosity": "medium"})).grammar is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "at least 1"),
        ({"input": 3}, "input", "list"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "input[0].content[0]", "input_text"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "missing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].image_url", "data:"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input[0].role", "alternate"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].type", "message"),
        ({"instructions": "Be brief."}, "instructions", "not trained with system messages"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"n": 2}, "n", "Unknown"),
        ({"max_tokens": 5}, "max_tokens", "Did you mean"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]", "logprobs"),
        ({"text": {"format": {"type": "json_schema", "schema": 3}}}, "text.format.schema", "dict"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 3}}}}, "text.format", "grammar"),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "not supported"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"stream_options": {}}, "stream_options", "needs 'stream'"),
    ],
)
def test_refusals(scripted, fields, param, words):
    with pytest.raises(ApiError) as caught:
        respond(scripted()[0], **fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


def test_instructions_where_the_model_was_trained_with_such(scripted):
    service, asked = scripted(system_messages=True)
    respond(service, instructions="Be brief.")
    assert "Be brief.\nWhat is it?" in service._tokenizer.decode(asked[0][0][0]["input_ids"], truncate_at_eos=False)
