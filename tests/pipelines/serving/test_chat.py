"""From a request to the events of its answer, without HTTP, Ray or a model: what is checked, and what is sent."""

import asyncio
import base64
import dataclasses
import io
import json
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo_core.generation.engine.requests import SamplingParams
from molmo_core.preprocessing.tokenizer import Tokenizer
from pipelines.serving.api.completions import CompletionRequest
from pipelines.serving.api.forms import JSONSchema, StructuredOutputs
from pipelines.serving.api.responses import InputMessage, ResponsesRequest, TextConfig
from pipelines.serving.api.tokenise import DetokenizeRequest, TokenizeRequest
from pipelines.serving.chat import ChatService
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.json_body import parse_json
from pipelines.serving.pieces import Piece
from pipelines.serving.schema import ChatRequest, ImageURL, Message, StreamOptions

TEXT = {"role": "user", "content": "What is it?"}


def picture(width=64, height=48) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 200, 9)).save(buffer, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}}


def request(*messages, **fields):
    return {"model": "m", "messages": list(messages) or [TEXT], **fields}


async def answered(service, body, method="start"):
    answer = await getattr(service, method)(body)
    if isinstance(answer, dict):
        return answer
    if not answer.streamed:
        return await answer.whole()
    await answer.begin()
    return [event async for event in answer.events()]


def ask(service, body, method="start"):
    return asyncio.run(answered(service, body, method))


def refusal(service, body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(service, body)
    assert json.dumps(caught.value.body(), ensure_ascii=False).encode()
    return caught.value


def tokens(service, text):
    return service._tokenizer.encode(text)


def test_chat_loads_neither_ray_nor_torch_nor_fastapi():
    code = "import sys, pipelines.serving.chat; print([m for m in ('ray', 'torch', 'fastapi', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_whole_answer(scripted):
    service, asked = scripted()
    words = tokens(service, " on the mat")
    service, asked = scripted(Piece(words[:1], None), Piece([], None), Piece(words[1:], "stop"))
    body = ask(service, request(max_tokens=7, temperature=0.5, top_p=0.25, seed=3))
    assert body["choices"][0]["message"]["content"] == "on the mat"
    assert body["choices"][0]["finish_reason"] == "stop"
    prompt = asked[0][0][0]["input_ids"]
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": len(words), "total_tokens": len(prompt) + len(words)}
    assert asked[0][0][1] == SamplingParams(7, temperature=0.5, top_p=0.25, seed=3)
    assert "metadata" not in asked[0][0][0], "the replica gets arrays alone"


def test_streamed_answer(scripted):
    service, _ = scripted()
    words = tokens(service, "on the mat")
    service, _ = scripted(*(Piece([word], None) for word in words), Piece([], "length"))
    events = ask(service, request(stream=True, stream_options={"include_usage": True}))
    assert all(event.endswith("\n\n") for event in events)
    assert events[-1] == "data: [DONE]\n\n"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "on the mat"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == len(words)


def test_a_stop_string_ends_the_work(scripted):
    service, _ = scripted()
    service, asked = scripted(Piece(tokens(service, "on the mat"), None), Piece([5], None))
    body = ask(service, request(stop=" the"))
    assert body["choices"][0]["message"]["content"] == "on"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert asked[0][1].cancelled


def test_whoever_leaves_ends_all_answers(scripted):
    """The stream is closed after the first event of text."""
    service, _ = scripted()
    words = tokens(service, "on the mat")
    for n in (1, 3):
        service, asked = scripted(*(Piece([word], None) for word in words), Piece([], "stop"))

        async def leave(service=service, n=n):
            answer = await service.start(request(stream=True, n=n))
            await answer.begin()
            events = answer.events()
            while 'content": "on' not in await anext(events):
                pass
            await events.aclose()

        asyncio.run(leave())
        assert len(asked) == n
        assert all(pieces.cancelled for _, pieces in asked)


def test_what_fails_in_a_stream_is_an_event(scripted):
    """The status has been sent by then; the client's library raises what the event says."""
    service, _ = scripted()
    words = tokens(service, "on the mat")
    for error, code in ((ApiError(503, "lost", None, "replica_lost"), "replica_lost"), (RuntimeError("secret path"), None)):
        service, _ = scripted(Piece(words, None), error)
        events = ask(service, request(stream=True))
        told = json.loads(events[-2].removeprefix("data: "))["error"]
        assert (told["type"], told["code"]) == ("server_error", code)
        assert "secret" not in told["message"]
        assert events[-1] == "data: [DONE]\n\n"


def test_image_sizes_stay_with_the_answer(scripted):
    service, _ = scripted()
    answer = asyncio.run(service.start(request({"role": "user", "content": [picture(64, 48), {"type": "text", "text": "?"}]})))
    assert answer.metadata["image_sizes"] == [(64, 48)]


SPECIALS = [
    "<|endoftext|>",
    "<|image|>",
    "<|video|>",
    "<image>",
    "<im_patch>",
    "<im_start>",
    "<|im_end|>",
    "<|POINT|>",
    '<point x="1" y="2">',
]


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("name", SPECIALS)
def test_text_that_looks_like_a_token_stays_text(scripted, golden_config, name, with_image):
    service, asked = scripted()
    tokenizer, text = service._tokenizer, f"a {name}{name} b"
    history = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ask(service, request(*history, {"role": "user", "content": [*([picture()] if with_image else []), {"type": "text", "text": text}]}))
    ids = asked[0][0][0]["input_ids"].tolist()
    assert ids.count(tokenizer.eos_token_id) == 2, "the begin token and the end of the model's turn"
    assert ids.count(tokenizer.image_start_token_id) == (2 if with_image else 0)
    read = tokenizer.decode([i for i in ids if i != tokenizer.eos_token_id], truncate_at_eos=False)
    assert read.count(text) == 3


def test_own_message_as_history(scripted):
    service, asked = scripted()
    for content in ("red", ""):
        own = ask(service, request())["choices"][0]["message"] | {"content": content}
        extra = {"annotations": [], "audio": None, "tool_calls": None, "function_call": None, "reasoning": None, "reasoning_content": ""}
        extra |= {"points": [{"index": 0, "x": 1.5, "label": None}], "parsed": {"colour": "red"}}
        for message in (own, {**own, **extra}, {**own, "tool_calls": [], "refusal": ""}):
            assert ask(service, request(TEXT, message, TEXT))["choices"][0]["finish_reason"] == "stop"
    assert len(asked) == 8


def test_text_beyond_the_context_is_refused_before_it_is_tokenised(scripted, monkeypatch):
    service, _ = scripted(max_text_bytes=64 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("it is tokenised"))
        error = refusal(service, request({"role": "user", "content": "a" * 30_000_000}))
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    service, _ = scripted(max_text_bytes=1000)
    assert refusal(service, request({"role": "user", "content": "ü" * 501})).status == 400
    assert ask(service, request({"role": "user", "content": "ü" * 500}))


@pytest.mark.parametrize("word", ["a", "word ", "<|endoftext|>"])
def test_the_longest_text_that_is_tokenised_holds_nobody_up(golden_config, monkeypatch, word):
    """The loop goes on while a text at the bound is read, and refused for its tokens."""
    config = dataclasses.replace(golden_config, llm=dataclasses.replace(golden_config.llm, max_sequence_length=30_000))
    service = ChatService(ServeConfig(model="m", name="m"), config, lambda *_: pytest.fail("the text is too long"))
    size = ServeConfig(model="m").max_text_bytes
    encode, beats = Tokenizer.encode, []

    async def start():
        loop = asyncio.get_running_loop()

        def slowly(*arguments):
            beat = threading.Event()
            loop.call_soon_threadsafe(beat.set)
            beats.append(beat.wait(60))
            return encode(*arguments)

        monkeypatch.setattr(Tokenizer, "encode", slowly)
        await service.start(request({"role": "user", "content": word * (size // len(word))}))

    with pytest.raises(ApiError, match="tokens"):
        asyncio.run(start())
    assert set(beats) == {True}


def test_errors_repeat_little_of_a_request(scripted):
    service, _ = scripted(max_text_bytes=64 << 20)
    long = "x" * 10_000_000
    bodies = [
        request(model=long),
        request() | {long: 1},
        request(temperature=long),
        request(stop=[long]),
        request(response_format=long),
        request({"role": long, "content": "x"}),
        request({"role": "user", "content": "x", long: 1}),
        request({"role": "user", "content": [{"type": long}]}),
        request({"role": "user", "content": [{"type": "image_url", "image_url": {"url": long}}]}),
        request({"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:{long}/a;base64,QQ=="}}]}),
        request({"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{long}-"}}]}),
        request({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,", "detail": long}}]}),
        request({"role": "user", "content": long}),
    ]
    for body in bodies:
        error = refusal(service, body)
        assert 400 <= error.status < 500
        assert len(json.dumps(error.body())) < 800


@pytest.mark.parametrize("body", [None, [], "x", 3, {}, {"model": "m"}, {"messages": []}, {"model": "m", "messages": [[]]}])
def test_bodies_of_another_shape(scripted, body):
    assert refusal(scripted()[0], body).status == 400


ANY_TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=8)
KINDS = {
    "start": (ChatRequest, {"model": "m", "messages": [TEXT]}),
    "complete": (CompletionRequest, {"model": "m", "prompt": "a"}),
    "respond": (ResponsesRequest, {"model": "m", "input": "a"}),
    "tokenize": (TokenizeRequest, {"prompt": "a"}),
    "detokenize": (DetokenizeRequest, {"tokens": [5]}),
}
NESTED = [Message, StreamOptions, ImageURL, InputMessage, TextConfig, JSONSchema, StructuredOutputs]
FIELDS = sorted({name for kind in [*NESTED, *(kind for kind, _ in KINDS.values())] for name in kind.model_json_schema()["properties"]})
FIELDS += ["type", "text", "image_url", "video_url", "file_id", "name", "5", "properties", "enum", "$ref"]
URLS = ["data:image/png;base64,", "data:image/gif;base64,R0lGODlh", "https://example.com"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 1e-300, 1e308, float("inf"), float("nan"), 0.5])
    | st.floats()
    | ANY_TEXT
    | st.sampled_from(
        [
            "m",
            "user",
            "assistant",
            "text",
            "image_url",
            "input_text",
            "output_text",
            "input_image",
            "json_schema",
            "json_object",
            "auto",
            "data:image/png;base64,",
            "data:image/gif;base64,R0lGODlh",
            *SPECIALS,
        ]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": ANY_TEXT}) | st.just(picture()) | VALUES
MESSAGES = st.builds(
    lambda role, content, rest: {"role": role, "content": content, **rest},
    st.sampled_from(["user", "assistant"]),
    ANY_TEXT | st.lists(PARTS, max_size=3),
    st.dictionaries(st.sampled_from(FIELDS) | ANY_TEXT, VALUES, max_size=1),
)
BODIES = st.builds(
    lambda messages, rest: {"model": "m", "messages": messages, **rest},
    st.lists(MESSAGES, max_size=3),
    st.dictionaries(st.sampled_from(FIELDS) | ANY_TEXT, VALUES, max_size=3),
)


@pytest.fixture(scope="module")
def fuzzed(golden_config):
    class One:
        async def __anext__(self):
            return Piece([5], "stop")

        def cancel(self):
            pass

    return ChatService(ServeConfig(model="m", name="m", max_images=2), golden_config, lambda *_: One())


def outcome(service, body, method="start") -> ApiError | None:
    """Answered with something that can be sent, or refused."""
    try:
        assert json.dumps(ask(service, body, method), ensure_ascii=False).encode()
    except ApiError as error:
        return error
    return None


def check_refusal(error: ApiError | None) -> None:
    """If it is one, it is the client's fault, and short."""
    if error is not None:
        assert 400 <= error.status < 500
        assert len(json.dumps(error.body(), ensure_ascii=False).encode()) < 4000


@settings(max_examples=75, deadline=None)
@given(st.one_of(BODIES, VALUES))
def test_no_body_is_the_fault_of_the_server(fuzzed, body):
    check_refusal(outcome(fuzzed, body))


@st.composite
def bodies(draw):
    """A method, and a body in which some fields are anything."""
    method = draw(st.sampled_from(sorted(KINDS)))
    kind, base = KINDS[method]
    return method, base | draw(st.dictionaries(st.sampled_from(sorted(kind.model_fields)), VALUES, max_size=3))


@settings(max_examples=100, deadline=None)
@given(bodies())
def test_no_field_is_the_fault_of_the_server(fuzzed, asked):
    method, body = asked
    check_refusal(outcome(fuzzed, body, method))


JSON_BYTES = VALUES.map(lambda value: json.dumps(value).encode())
ANY_BYTES = st.binary(max_size=60) | ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))


@settings(max_examples=75, deadline=None)
@given(JSON_BYTES | ANY_BYTES)
def test_no_bytes_are_the_fault_of_the_server(fuzzed, data):
    try:
        body = parse_json(data)
    except ApiError as error:
        check_refusal(error)
    else:
        check_refusal(outcome(fuzzed, body))
