"""Traces without Serve: a real ASGI application sends its spans to a real receiver of OTLP."""

import asyncio
import http.server
import json
import logging
import queue
import threading

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from molmo_core.generation.engine.requests import SamplingParams, Times
from pipelines.serving.errors import queue_full
from pipelines.serving.pieces import Piece
from pipelines.serving.traces import export, spans
from pipelines.serving.traces.content import inputs
from pipelines.serving.traces.middleware import Traced
from pipelines.serving.traces.spans import Tracer

PARAMS = SamplingParams(max_tokens=7, temperature=0.5, seed=3)
PICTURE = "data:image/png;base64,aGVsbG8="


class Receiver:
    """An OTLP endpoint that keeps what it is sent."""

    def __init__(self):
        received = self.received = queue.SimpleQueue()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.put((dict(self.headers), ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args): ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self):
        """All that has come, by name."""
        found = {}
        while not self.received.empty():
            for resource in self.received.get()[1].resource_spans:
                for scope in resource.scope_spans:
                    for one in scope.spans:
                        found.setdefault(one.name, []).append(one)
        return found


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """However busy the machine is."""
    monkeypatch.setattr(export, "CLOSE_S", 60.0)


class Pieces:
    def __init__(self, *pieces):
        self._pieces = iter(pieces)
        self.cancelled = False

    async def __anext__(self):
        piece = next(self._pieces)
        if isinstance(piece, Exception):
            raise piece
        await asyncio.sleep(0.02)
        return piece

    def cancel(self):
        self.cancelled = True


def application(tracer, *pieces, stop_early=False):
    """A server whose requests ask for one answer of these pieces."""
    app = FastAPI()
    app.add_middleware(Traced, tracer=lambda: tracer)

    async def parts():
        watched = spans.watched(Pieces(*pieces), "m", 11, PARAMS)
        texts = []
        while True:
            piece = await watched.__anext__()
            texts += map(str, piece.tokens)
            yield f"data: {piece.tokens}\n\n"
            if stop_early:
                watched.cancel()
                break
            if piece.finish_reason:
                break
        spans.answered([" ".join(texts)])

    @app.post("/v1/chat/completions")
    async def chat(body: dict):
        spans.asked(body)
        with spans.span("media"):
            await asyncio.sleep(0.02)
        if body.get("stream"):
            return StreamingResponse(parts(), media_type="text/event-stream")
        try:
            return JSONResponse([part async for part in parts()])
        except Exception as error:
            return JSONResponse({}, getattr(error, "status", 500))

    @app.get("/v1/models")
    async def models():
        return {}

    return app


def ask(app, body=None, **headers):
    async def post():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/v1/chat/completions", json=body or {}, headers=headers)

    return asyncio.run(post())


def attributes(span):
    def plain(value):
        kind = value.WhichOneof("value")
        inner = getattr(value, kind)
        return [plain(one) for one in inner.values] if kind == "array_value" else inner

    return {pair.key: plain(pair.value) for pair in span.attributes}


def seconds(span):
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


ANSWER = [Piece([5], None, times=Times(0.25, 0.5, 0.125)), Piece([6, 7], "stop")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_gives_its_spans(receiver, stream):
    tracer = Tracer(receiver.url, 1.0, False)
    assert ask(application(tracer, *ANSWER), {"stream": stream, "messages": []}).status_code == 200
    tracer.close()
    found = receiver.spans()
    assert {name: len(group) for name, group in found.items()} == dict.fromkeys(
        ("chat m", "media", "queue", "prefill", "vision", "decode"), 1
    )
    one = {name: group[0] for name, group in found.items()}
    root = one["chat m"]
    assert root.parent_span_id == b""
    for name, parent in {"media": "chat m", "queue": "chat m", "prefill": "chat m", "vision": "prefill", "decode": "chat m"}.items():
        assert one[name].parent_span_id == one[parent].span_id, name
        assert one[name].trace_id == root.trace_id
    assert [seconds(one[name]) for name in ("queue", "prefill", "vision")] == pytest.approx([0.25, 0.5, 0.125])
    assert one["media"].end_time_unix_nano <= one["queue"].start_time_unix_nano
    assert one["queue"].end_time_unix_nano == one["prefill"].start_time_unix_nano == one["vision"].start_time_unix_nano
    assert one["prefill"].end_time_unix_nano == one["decode"].start_time_unix_nano
    assert root.start_time_unix_nano <= one["media"].start_time_unix_nano
    assert attributes(root) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "molmo-pipelines",
        "gen_ai.request.model": "m", "gen_ai.response.model": "m", "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 11, "gen_ai.usage.output_tokens": 3,
        "gen_ai.request.max_tokens": 7, "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 1.0, "gen_ai.request.top_k": 0,
        "gen_ai.request.presence_penalty": 0.0, "gen_ai.request.frequency_penalty": 0.0, "gen_ai.request.seed": 3,
        "http.request.method": "POST", "url.path": "/v1/chat/completions", "http.response.status_code": 200,
    }  # fmt: skip


def test_an_answer_that_a_stop_string_ends_has_its_times(receiver):
    tracer = Tracer(receiver.url, 1.0, False)
    ask(application(tracer, *ANSWER, stop_early=True))
    tracer.close()
    found = receiver.spans()
    assert attributes(found["chat m"][0])["gen_ai.usage.output_tokens"] == 1
    assert seconds(found["prefill"][0]) == pytest.approx(0.5)


def test_what_a_client_says_of_its_trace_is_kept(receiver):
    tracer = Tracer(receiver.url, 1.0, False)
    ask(application(tracer, *ANSWER), traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01")
    tracer.close()
    root = receiver.spans()["chat m"][0]
    assert root.trace_id == bytes.fromhex("ab" * 16)
    assert root.parent_span_id == bytes.fromhex("cd" * 8)


def test_errors(receiver):
    """A refusal is the client's to know; a failure is marked."""
    tracer = Tracer(receiver.url, 1.0, False)
    assert ask(application(tracer, queue_full())).status_code == 429
    assert ask(application(tracer, OSError("lost"))).status_code == 500
    tracer.close()
    refused, failed = receiver.spans()["chat m"]
    assert (attributes(refused)["error.type"], refused.status.code) == ("ApiError", 0)
    assert (attributes(failed)["error.type"], failed.status.code) == ("OSError", 2)


def test_a_sample(receiver):
    tracer = Tracer(receiver.url, 0.5, False)
    app = application(tracer, *ANSWER)
    traced = [f"00-{i:032x}-{1:016x}-01" for i in (1 << 62, (1 << 64) - 1)]  # the ratio counts in the last 8 bytes of the trace's id
    for parent in traced:
        ask(app, traceparent=parent)
    tracer.close()
    assert [int.from_bytes(root.trace_id) for root in receiver.spans()["chat m"]] == [1 << 62]


def test_texts_and_pictures_only_where_they_are_wanted(receiver, monkeypatch):
    content = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "what is it?"}]
    body = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}, {"role": "user", "content": "and?"}]}

    def traced(wanted):
        tracer = Tracer(receiver.url, 1.0, wanted)
        ask(application(tracer, *ANSWER), body)
        tracer.close()
        return attributes(receiver.spans()["chat m"][0])

    assert not any(word in str(traced(False)) for word in ("what is it", "aGVsbG8"))
    sent = traced(True)
    assert json.loads(sent["gen_ai.input.messages"])[0] == {
        "role": "user",
        "parts": [
            {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "aGVsbG8="},
            {"type": "text", "content": "what is it?"},
        ],
    }
    assert json.loads(sent["gen_ai.output.messages"]) == [{"role": "assistant", "parts": [{"type": "text", "content": "5 6 7"}]}]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-mlflow-experiment-id=1")
    shown = traced(True)
    assert json.loads(shown["mlflow.spanInputs"])["messages"][0]["content"] == content
    assert json.loads(shown["mlflow.spanOutputs"])["choices"][0]["message"]["content"] == "5 6 7"


def test_headers_of_the_environment_are_sent(receiver, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-mlflow-experiment-id=1,authorization=Bearer%20secret")
    tracer = Tracer(receiver.url, 1.0, False)
    ask(application(tracer, *ANSWER))
    tracer.close()
    headers, _ = receiver.received.get(timeout=10)
    assert {name.lower(): value for name, value in headers.items()}["x-mlflow-experiment-id"] == "1"


def test_large_media_are_only_named(receiver):
    large = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + "a" * 3_000_000}}
    tracer = Tracer(receiver.url, 1.0, True)
    ask(application(tracer, *ANSWER), {"messages": [{"role": "user", "content": [large]}]})
    tracer.close()
    (message,) = json.loads(attributes(receiver.spans()["chat m"][0])["gen_ai.input.messages"])
    assert message["parts"] == [{"type": "text", "content": "[video_url: data:video/mp4;base64, 3,000,022 characters]"}]


def test_a_receiver_that_is_not_there_costs_a_line(receiver, caplog, monkeypatch):
    monkeypatch.setattr(export, "CLOSE_S", 0.5)
    receiver.server.shutdown()
    receiver.server.server_close()
    tracer = Tracer(receiver.url, 1.0, False)
    app = application(tracer, *ANSWER)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            assert ask(app).status_code == 200
        tracer.close()
    (line,) = caplog.records
    assert receiver.url in line.getMessage()
    assert "Connection" in line.getMessage()


def test_without_a_tracer_nothing_is_done():
    app = application(None, *ANSWER)
    assert ask(app).status_code == 200
    assert spans.current.get() is None


@pytest.mark.parametrize(
    "body",
    [
        None,
        5,
        [],
        {},
        {"messages": 3},
        {"messages": [5, None, {"content": [None, {"type": "image_url"}, 3]}]},
        {"prompt": "a"},
        {"input": [{"content": [{"type": "input_image", "image_url": PICTURE}]}]},
    ],
)
def test_any_body_can_be_shown(body):
    for for_mlflow in (False, True):
        (text,) = inputs(body, for_mlflow).values()
        assert json.loads(text) is not None
