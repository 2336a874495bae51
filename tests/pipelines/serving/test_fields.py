"""Every field that steers an answer, with a real engine: what it does, and that at its edges it harms nobody."""

import asyncio
import json
import re

import pytest

from pipelines.serving.errors import ApiError

run = asyncio.Runner().run  # one loop for all: the engine's thread hands its events to it


def request(text="What is it?", **fields):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


async def answered(service, body):
    return await (await service.start(body)).whole()


async def streamed(service, body):
    answer = await service.start({**body, "stream": True})
    await answer.begin()
    events = [event async for event in answer.events()]
    assert events[-1] == "data: [DONE]\n\n"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def ask(service, **fields):
    """The text of each answer."""
    body = run(answered(service, request(**fields)))
    return [choice["message"]["content"] for choice in body["choices"]]


@pytest.fixture(scope="module")
def greedy(engined):
    """The answer without any field."""
    (text,) = ask(engined)
    return text


def tokens_of(service, **fields):
    body = run(answered(service, request(logprobs=True, **fields)))
    return [(entry["token"], *(entry["bytes"] or ())) for entry in body["choices"][0]["logprobs"]["content"]]


def text_of(content):
    return bytes(byte for entry in content for byte in entry["bytes"] or ()).decode("utf-8", "replace").lstrip()


# At its edges a field gives an answer, or is refused by its name.
EDGES = {
    "temperature": [0, -0.0, 1e-300, 5e-324, 1e-5, 2, -1e-300, 2.0001, 1e300],
    "top_p": [1e-300, 5e-324, 1, 0.5, 0, -0.0, 1.0001],
    "top_k": [-1, 0, 1, 2**24 + 1, 2**31 - 1, -2, 2**31, 2**63, 10**400],
    "min_p": [0, -0.0, 1e-300, 1, 1.0001, -1e-300],
    "repetition_penalty": [0.01, 1, 100, 0, -0.0, 1e-300, 1e300, -1],
    "presence_penalty": [-2, 2, -0.0, 1e-300, 2.1, 1e300],
    "frequency_penalty": [-2, 2, -0.0, 1e-300, -2.1, 1e300],
    "logit_bias": [
        {}, {"0": -100}, {"1023": 100}, {"1023": 1e-300}, {str(i): -100 for i in range(300)}, {"1024": 1}, {"-1": 1}, {"1": 1e300}
    ],
    "min_tokens": [0, 1, 12, 13, 2**63, -1],
    "max_tokens": [1, 2**63, 10**400, 0],
    "seed": [0, -1, 2**63 - 1, -(2**63), 2**32, 2**63, -(2**63) - 1],
    "stop_token_ids": [[], [0], [1023], list(range(64)), [1024], [2**63], [-1], list(range(65))],
    "stop": ["�", "\u0000", "x" * 1000, ["a", "b", "c", "d"], "", [], ["x"] * 5],
    "n": [1, 4, 128, 0, -1, 129, 2**63],
    "top_logprobs": [0, 20, 21, -1],
}  # fmt: skip
EXTREMES = [
    {"temperature": 2, "top_k": 1, "top_p": 1e-300, "min_p": 1},
    {"temperature": 1e-4, "repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": -2},
    {"min_tokens": 12, "ignore_eos": True},
    {"min_tokens": 12, "ignore_eos": True, "stop_token_ids": [5]},
    {"min_tokens": 12, "logit_bias": {"0": 100}, "temperature": 1},
    {"n": 4, "temperature": 2, "logprobs": True, "top_logprobs": 20, "stop": "a", "include_stop_str_in_output": True},
]
ALL_EDGES = [{name: value} | ({"temperature": 1} if name != "temperature" else {}) for name, values in EDGES.items() for value in values]


def test_edges_harm_nobody(engined, greedy):
    """All at once, between neighbours that must get the answers that they get alone."""

    async def outcome(fields):
        try:
            return json.dumps(await answered(engined, request(**{"logprobs": "top_logprobs" in fields, **fields})), allow_nan=False)
        except ApiError as error:
            return error.status

    async def everything():
        gate = asyncio.Semaphore(12)

        async def gated(work):
            async with gate:
                return await work

        neighbours = [answered(engined, request()) for _ in range(20)]
        edges = [outcome(fields) for fields in [*ALL_EDGES, *EXTREMES]]
        mixed = [work for pair in zip(edges, [*neighbours, *[None] * len(edges)]) for work in pair if work is not None]
        results = await asyncio.gather(*map(gated, mixed))
        alone = [result["choices"][0]["message"]["content"] for result in results if isinstance(result, dict)]
        return alone, [result for result in results if isinstance(result, int)]

    neighbours, refused = run(everything())
    assert neighbours == [greedy] * 20
    assert set(refused) == {400, 429}, "429: more answers than there are places"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDGES.items() for value in values[-1:]])
def test_beyond_the_edge_is_refused(engined, name, value):
    with pytest.raises(ApiError) as caught:
        ask(engined, **{name: value}, **({"logprobs": True} if name == "top_logprobs" else {}))
    assert caught.value.status == 400
    assert caught.value.param.startswith(name)


def test_one_candidate_is_the_greedy_one(engined, greedy):
    assert ask(engined, temperature=2, seed=1) != [greedy]
    for only in ({"top_k": 1}, {"top_p": 1e-300}, {"min_p": 1}, {"temperature": 1e-300}):
        assert ask(engined, **{"temperature": 2, "seed": 1, **only}) == [greedy]


def test_seeds_of_64_bits(engined):
    """The same seed draws the same; seeds that differ in their upper half alone draw differently."""
    seeds = [3, 3 + 2**32, 3 + 2**33, 3 - 2**63]
    drawn = [ask(engined, temperature=2, seed=seed)[0] for seed in seeds]
    assert len(set(drawn)) == len(seeds)
    assert [ask(engined, temperature=2, seed=seed)[0] for seed in seeds] == drawn


def test_several_answers_are_those_of_seeds_in_turn(engined):
    several = ask(engined, temperature=2, seed=7, n=3)
    assert several == [ask(engined, temperature=2, seed=seed)[0] for seed in (7, 8, 9)]
    assert len(set(several)) == 3
    body = run(answered(engined, request(n=3, max_tokens=4, ignore_eos=True)))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 12


def test_several_answers_streamed(engined):
    fields = {"temperature": 2, "seed": 7, "n": 3}
    chunks = run(streamed(engined, request(**fields, stream_options={"include_usage": True})))
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ask(engined, **fields)
    assert sorted(c["choices"][0]["index"] for c in chunks[:-1] if c["choices"][0]["finish_reason"]) == [0, 1, 2]
    assert chunks[-1]["usage"]["completion_tokens"] > 3


def test_logprobs(engined, greedy):
    """As OpenAI writes them: of every token, with bytes, the most probable first; their texts are the answer."""
    body = run(answered(engined, request(logprobs=True, top_logprobs=3)))
    content = body["choices"][0]["logprobs"]["content"]
    assert text_of(content) == greedy
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(entry["top_logprobs"]) == 3
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert (entry["token"], entry["logprob"]) == (entry["top_logprobs"][0]["token"], values[0]), "greedy takes the first"
    assert run(answered(engined, request(logprobs=True)))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert run(answered(engined, request()))["choices"][0]["logprobs"] is None


def test_logprobs_streamed_end_where_the_text_ends(engined, greedy):
    """A stop string is held back until it is complete, and so are the tokens that it is made of."""
    stop = greedy[len(greedy) // 2 :][:3]
    for fields in ({}, {"stop": stop}, {"stop": stop, "include_stop_str_in_output": True}):
        whole = run(answered(engined, request(logprobs=True, **fields)))["choices"][0]
        chunks = run(streamed(engined, request(logprobs=True, **fields)))
        sent = [entry for chunk in chunks if (of := chunk["choices"][0]["logprobs"]) for entry in of["content"]]
        assert sent == whole["logprobs"]["content"]
        assert text_of(sent).startswith(whole["message"]["content"])
        assert len(text_of(sent[:-1])) <= len(whole["message"]["content"]), "no token of the text that was cut off"


def test_bias(engined):
    letter = engined._tokenizer.encode("z")[0]
    assert set(ask(engined, logit_bias={str(letter): 100}, max_tokens=3)[0]) == {"z"}
    other = engined._tokenizer.encode("y")[0]
    assert set(ask(engined, logit_bias={str(letter): -100, str(other): 100}, max_tokens=3)[0]) == {"y"}


def test_a_penalty_for_repetition(engined):
    once = tokens_of(engined, repetition_penalty=100, ignore_eos=True)
    assert len(set(once)) == len(once) == 12


def test_stop_strings_and_tokens(engined, greedy):
    stop = greedy[3:5]
    end = greedy.find(stop)
    assert ask(engined, stop=stop) == [greedy[:end]]
    assert ask(engined, stop=stop, include_stop_str_in_output=True) == [greedy[: end + 2]]
    letter = engined._tokenizer.encode("z")[0]
    body = run(answered(engined, request(logit_bias={str(letter): 100}, stop_token_ids=[letter], ignore_eos=True)))
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["message"]["content"]) == ("stop", "")


def test_the_least_length(engined, greedy):
    """Neither the end token nor a stop string ends the answer before."""
    stop = greedy[3:5]
    assert ask(engined, stop=stop, min_tokens=12) == [greedy]
    end = engined._tokenizer.eos_token_id
    assert ask(engined, logit_bias={str(end): 100}) == [""]
    body = run(answered(engined, request(logit_bias={str(end): 100}, min_tokens=3)))
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (3, "stop")


FORMS = [
    ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7, 8]}}}},
        lambda text: json.loads(text) in (7, 8),
    ),
    (
        {"structured_outputs": {"json": {"type": "array", "maxItems": 1, "items": {"type": "null"}}}},
        lambda text: json.loads(text) in ([], [None]),
    ),
    ({"structured_outputs": {"regex": "[ab]{3}!"}}, lambda text: re.fullmatch("[ab]{3}!", text)),
    ({"structured_outputs": {"choice": ["red", "blue"]}}, lambda text: text in ("red", "blue")),
]


@pytest.mark.parametrize(("fields", "fits"), FORMS)
def test_answers_of_a_form(engined, fields, fits):
    soon_closed = {str(engined._tokenizer.encode(mark)[0]): 50 for mark in "{}"}  # random weights write no end otherwise
    for text in ask(engined, **fields, temperature=1, seed=1, n=3, max_tokens=120, logit_bias=soon_closed):
        assert fits(text), text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "x" * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": 3}}}, "structured_outputs"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(?<=a)", "type": "string"}}}},
            "response_format",
        ),
    ],
)
def test_forms_that_are_none(engined, greedy, fields, param):
    with pytest.raises(ApiError) as caught:
        ask(engined, **fields)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, "invalid_grammar")
    assert len(caught.value.message) < 300
    assert ask(engined) == [greedy]


def test_one_failed_answer_of_several_ends_the_request(scripted):
    service, asked = scripted(ApiError(429, "full"))
    with pytest.raises(ApiError, match="full"):
        run(answered(service, request(n=3)))
    assert len(asked) == 3
    assert all(pieces.cancelled for _, pieces in asked)
