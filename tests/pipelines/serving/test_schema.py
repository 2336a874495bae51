"""Requests: what is accepted, and that each refusal names the field and the remedy."""

import dataclasses
import json

import pytest

from molmo_core.generation.engine.requests import Grammar, SamplingParams
from pipelines.serving.api.messages import conversation
from pipelines.serving.errors import ApiError
from pipelines.serving.media.parts import Medium
from pipelines.serving.schema import ChatRequest

QUESTION = {"role": "user", "content": "What is this?"}


def content(part):
    return {"role": "user", "content": [part]}


def request(system=False, **fields):
    parsed = ChatRequest.parse({"model": "molmo", "messages": [QUESTION], **fields})
    parsed.check_tokens(1000)
    conversation(parsed.turns, system)
    return parsed


def test_parts_and_defaults():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}},
        {"type": "text", "text": "b"},
    ]
    parsed = request(messages=[{"role": "user", "content": parts}])
    (turn,) = parsed.turns
    assert turn.text == "a\nb"
    assert turn.media == (Medium("image", "data:x", "messages[0].content[1].image_url.url"),)
    assert (parsed.temperature, parsed.top_p, parsed.stream, parsed.new_tokens, parsed.stop) == (0, 1, False, None, [])


def test_what_openai_clients_send():
    parsed = request(max_completion_tokens=5, max_tokens=9, n=1, user="me", stop="x", frequency_penalty=0, seed=None, logprobs=False)
    assert parsed.new_tokens == 5
    assert parsed.stop == ["x"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "system", "content": "x"}, QUESTION]}, "messages[0].role", "not trained with system messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user', 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role", "alternate"),
        ({"messages": [QUESTION, QUESTION]}, "messages[1].role", "alternate"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "x"}]}, "messages[1]", "last message"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages[0].content", "empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].image_url",
            "dict",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url", "missing"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stop": ["a"] * 5}, "stop", "one to four"),
        ({"stop": [""]}, "stop", "one to four"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_k": 10**400}, "top_k", "less than"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"presence_penalty": -2.1}, "presence_penalty", "greater than or equal to -2"),
        ({"frequency_penalty": 1e300}, "frequency_penalty", "less than or equal to 2"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"logit_bias": {"01": 1}}, "logit_bias.01", "pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"1000": 1}}, "logit_bias", "1,000 tokens; 1000 is none"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "at most 300"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
        ({"stop_token_ids": [1000]}, "stop_token_ids", "1000 is none"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"logprobs": 1}, "logprobs", "boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "needs 'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format.json_schema.schema", "dict"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "not supported"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "either 'response_format' or",
        ),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"temperature": True}, "temperature", "number"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": "x" * 1001}, "stop", "1,000 characters"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "False"),
        ({"messages": [{**QUESTION, "name": "Ada"}]}, "messages[0].name", "not supported"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": "x", "tool_calls": [{}]}, QUESTION]},
            "messages[1].tool_calls",
            "not supp",
        ),
        ({"messages": [QUESTION, {"role": "assistant", "content": "x", "audio": {"id": "a"}}, QUESTION]}, "messages[1].audio", "not supp"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "x", "refusal": "no"}, QUESTION]}, "messages[1].refusal", "not supp"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}, QUESTION]}, "messages[1].content", "missing"),
        ({"model": 3}, "model", "string"),
    ],
)
def test_refusals(fields, param, words):
    with pytest.raises(ApiError) as caught:
        request(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert words in caught.value.message
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


def test_a_system_message_where_the_model_was_trained_with_one():
    parsed = request(system=True, messages=[{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "!"}, QUESTION])
    assert [(turn.role, turn.text) for turn in conversation(parsed.turns, True)] == [("user", "Be brief.\n!\nWhat is this?")]
    for messages in ([{"role": "system", "content": "x"}], [QUESTION, {"role": "system", "content": "x"}]):
        with pytest.raises(ApiError):
            request(system=True, messages=messages)


def test_every_field_reaches_the_engine():
    fields = {"temperature": 0.5, "top_p": 0.25, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": -1.0}
    fields |= {"frequency_penalty": 1.25, "min_tokens": 2, "ignore_eos": True, "seed": -9, "top_k": 7}
    parsed = request(
        **fields, logit_bias={"5": 2, "0": -1.5}, stop_token_ids=[3, 4], logprobs=True, top_logprobs=6, structured_outputs={"regex": "a|b"}
    )
    expected = SamplingParams(50, **fields, logit_bias={5: 2, 0: -1.5}, stop_token_ids=(3, 4), logprobs=6, grammar=Grammar("regex", "a|b"))
    assert parsed.params(50) == expected
    assert {field.name for field in dataclasses.fields(SamplingParams) if getattr(expected, field.name) == field.default} == set()
    assert request(top_k=-1).params(50) == request().params(50) == SamplingParams(50)
    assert request(logprobs=True).params(50).logprobs == 0


def test_forms_of_answers():
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    text = json.dumps(schema)
    named = {"name": "x", "description": "y", "schema": schema, "strict": True}
    assert request(response_format={"type": "json_schema", "json_schema": named}).grammar == Grammar("json_schema", text)
    assert request(response_format={"type": "json_object"}).grammar == Grammar("json_schema", '{"type": "object"}')
    assert request(structured_outputs={"json": schema}).grammar == Grammar("json_schema", text)
    assert request(structured_outputs={"json": text}).grammar == Grammar("json_schema", text)
    assert request(structured_outputs={"choice": ["a", "b"]}).grammar == Grammar("choice", '["a", "b"]')
    assert request(response_format={"type": "text"}).grammar is None
    assert request().grammar is None


def test_the_seed_of_each_answer():
    """seed + i, brought back into 64 bits."""
    assert [request(seed=5, n=3).params(10, i).seed for i in range(3)] == [5, 6, 7]
    assert request(seed=2**63 - 1, n=2).params(10, 1).seed == -(2**63)
    assert request().params(10, 1).seed is None


def test_the_least_length_is_within_the_greatest():
    assert request(min_tokens=10).params(10).min_tokens == 10
    with pytest.raises(ApiError, match="'min_tokens' is 11, but the answer may have 10"):
        request(min_tokens=11).params(10)


def test_missing_model_and_wrong_body():
    with pytest.raises(ApiError, match="'model' is missing"):
        ChatRequest.parse({"messages": [QUESTION]})
    with pytest.raises(ApiError, match="JSON object"):
        ChatRequest.parse([1])
