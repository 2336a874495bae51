"""Requests: what is accepted, and that each refusal names the field and the remedy."""

import pytest

from pipelines.serving.errors import ApiError
from pipelines.serving.schema import ChatRequest

QUESTION = {"role": "user", "content": "What is this?"}


def content(part):
    return {"role": "user", "content": [part]}


def request(**fields):
    return ChatRequest.parse({"model": "molmo", "messages": [QUESTION], **fields})


def test_parts_and_defaults():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}},
        {"type": "text", "text": "b"},
    ]
    parsed = request(messages=[{"role": "user", "content": parts}])
    assert parsed.messages[0].text == "a\nb"
    assert parsed.messages[0].images == ["data:x"]
    assert (parsed.temperature, parsed.top_p, parsed.stream, parsed.new_tokens, parsed.stops) == (0, 1, False, None, [])


def test_what_openai_clients_send():
    parsed = request(max_completion_tokens=5, max_tokens=9, n=1, user="me", stop="x", frequency_penalty=0, seed=None, logprobs=False)
    assert parsed.new_tokens == 5
    assert parsed.stops == ["x"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "system", "content": "x"}, QUESTION]}, "messages[0].role", "no system prompt"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "use 'user' or 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role", "alternate"),
        ({"messages": [QUESTION, QUESTION]}, "messages[1].role", "alternate"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "x"}]}, "messages", "last message"),
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
        ({"n": 2}, "n", "not supported"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
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


def test_missing_model_and_wrong_body():
    with pytest.raises(ApiError, match="'model' is missing"):
        ChatRequest.parse({"messages": [QUESTION]})
    with pytest.raises(ApiError, match="JSON object"):
        ChatRequest.parse([1])
