"""Texts that are continued, and tokens: without HTTP."""

import asyncio
import json

import pytest

from molmo_core.generation.engine.requests import TokenLogprobs
from pipelines.serving.errors import ApiError
from pipelines.serving.pieces import Piece


def request(**fields):
    return {"model": "m", "prompt": "The sky is", **fields}


async def completed(service, body):
    answer = await service.complete(body)
    if not answer.streamed:
        return await answer.whole()
    await answer.begin()
    return [event async for event in answer.events()]


def complete(service, **fields):
    return asyncio.run(completed(service, request(**fields)))


def scripted_words(scripted, text):
    service, _ = scripted()
    tokens = service._tokenizer.encode(text)
    logprobs = [TokenLogprobs(-0.5, [(token, -0.5), (token + 1, -1.5)]) for token in tokens]
    return scripted(Piece(tokens[:1], None, logprobs[:1]), Piece(tokens[1:], "stop", logprobs[1:]))


def test_a_text_is_continued_as_it_is(scripted):
    service, asked = scripted_words(scripted, " blue")
    body = complete(service)
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": " blue", "finish_reason": "stop", "logprobs": None}], "with its blank"
    tokenizer = service._tokenizer
    assert asked[0][0][0]["input_ids"].tolist() == [tokenizer.bos_token_id, *tokenizer.encode("The sky is")]
    assert body["usage"]["prompt_tokens"] == len(asked[0][0][0]["input_ids"])


def test_several_texts_and_answers(scripted):
    service, asked = scripted_words(scripted, " blue")
    body = complete(service, prompt=["a", "b c"], n=2, seed=5)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [request[1].seed for request, _ in asked] == [5, 6, 5, 6]
    assert [len(request[0]["input_ids"]) for request, _ in asked] == [2, 2, *[len(asked[2][0][0]["input_ids"])] * 2]


def test_each_text_has_the_room_of_one(scripted):
    service, _ = scripted_words(scripted, " blue")
    long = "ab " * 500
    assert len(complete(service, prompt=[long] * 20, max_tokens=1)["choices"]) == 20
    service, _ = scripted(max_text_bytes=10_000)
    with pytest.raises(ApiError, match="30,000 bytes; this server takes 10,000"):
        complete(service, prompt=[long] * 20)


def test_logprobs_as_lists(scripted):
    service, _ = scripted_words(scripted, " blue sky")
    whole = complete(service, logprobs=2)["choices"][0]["logprobs"]
    assert "".join(whole["tokens"]) == " blue sky"
    assert whole["text_offset"] == [len("".join(whole["tokens"][:i])) for i in range(len(whole["tokens"]))]
    assert set(whole["token_logprobs"]) == {-0.5}
    assert all(sorted(top.values()) == [-1.5, -0.5] for top in whole["top_logprobs"])
    service, _ = scripted_words(scripted, " blue sky")
    events = complete(service, logprobs=2, stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == " blue sky"
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    assert {key: [value for part in told for value in part[key]] for key in whole} == whole
    assert chunks[-1]["usage"]["completion_tokens"] == len(whole["tokens"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, 2]}, "prompt[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": "x " * 3000}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"prompt": ["x"] * 128, "n": 3}, "n"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_refusals(scripted, fields, param):
    with pytest.raises(ApiError) as caught:
        complete(scripted()[0], **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_tokens_of_a_text_and_back(scripted):
    service, _ = scripted()
    told = asyncio.run(service.tokenize({"model": "m", "prompt": "Löffel 🥄", "return_token_strs": True}))
    assert told["tokens"] == [service._tokenizer.bos_token_id, *service._tokenizer.encode("Löffel 🥄")]
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), service.context)
    assert told["token_strs"][:2] == ["<|endoftext|>", service._logprobs.text(told["tokens"][1])]
    assert asyncio.run(service.detokenize({"tokens": told["tokens"]})) == {"prompt": "<|endoftext|>Löffel 🥄"}
    plain = asyncio.run(service.tokenize({"prompt": "Löffel 🥄", "add_special_tokens": False}))
    assert plain["token_strs"] is None
    assert asyncio.run(service.detokenize({"tokens": plain["tokens"]})) == {"prompt": "Löffel 🥄"}


def test_tokens_of_a_conversation_are_those_that_the_model_is_given(scripted):
    service, asked = scripted()
    messages = [{"role": "user", "content": "What is it?"}]
    told = asyncio.run(service.tokenize({"model": "m", "messages": messages}))
    asyncio.run(service.start({"model": "m", "messages": messages}))
    assert told["tokens"] == asked[0][0][0]["input_ids"].tolist()


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"prompt": "x", "add_generation_prompt": False}, 400, "add_generation_prompt"),
        ({"prompt": "x" * 300_000}, 400, "prompt"),
    ],
)
def test_what_is_not_tokenised(scripted, body, status, param):
    with pytest.raises(ApiError) as caught:
        asyncio.run(scripted()[0].tokenize(body))
    assert (caught.value.status, caught.value.param) == (status, param)


@pytest.mark.parametrize("tokens", [[-1], [10**9], [2**31], ["1"], "x", None])
def test_what_is_not_detokenised(scripted, tokens):
    with pytest.raises(ApiError) as caught:
        asyncio.run(scripted()[0].detokenize({"tokens": tokens}))
    assert caught.value.param.startswith("tokens")
