"""Traces of requests: OpenTelemetry spans, sent by OTLP over HTTP. Off unless `trace_endpoint` is set.

    chat NAME            a request, until the last byte of its answer was handed on
    ├─ media             decoding and preprocessing what it holds, and tokenising
    ├─ queue             of each answer: until the engine began on it
    ├─ prefill           of each answer: reading the prompt, until the first token
    │  └─ vision         encoding its media
    └─ decode            of each answer: the other tokens

What happened in a replica is told as durations (`Times`), so that machines need no common clock. Names are those of OpenTelemetry's
conventions for generative AI where these have one. Spans wait in a bounded queue and are sent from a thread: a receiver that is slow or
not there costs no request anything.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from molmo_core.generation.engine.requests import SamplingParams, Times
from pipelines.serving.errors import ApiError
from pipelines.serving.pieces import Piece, Pieces
from pipelines.serving.traces.content import inputs, outputs
from pipelines.serving.traces.export import Exporter

QUEUED_SPANS = 2048
BATCH = 128
"""Spans in one message."""

current: ContextVar[Trace | None] = ContextVar("trace", default=None)
"""The trace of the request that is being answered; None: it has none."""


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A part of the request that is being answered, if it is traced."""
    trace = current.get()
    if trace is None:
        yield
        return
    begun = time.time_ns()
    try:
        yield
    finally:
        trace.add(name, begun, time.time_ns())


def watched(pieces: Pieces, model: str, prompt_tokens: int, params: SamplingParams) -> Pieces:
    """An answer of a model whose times are put into the trace of its request, if there is one."""
    trace = current.get()
    if trace is None:
        return pieces
    trace.model(model)
    return _Watched(pieces, trace, prompt_tokens, params)


def asked(body: Any) -> None:
    """The request, as it was sent."""
    if (trace := current.get()) is not None and trace.content:
        trace.attributes |= inputs(body, trace.for_mlflow)


def answered(texts: Sequence[str]) -> None:
    """The answers to it."""
    if (trace := current.get()) is not None and trace.content:
        trace.attributes |= outputs(texts, trace.for_mlflow)


class Tracer:
    """Makes spans and sends them.

    Args:
        endpoint: where to, e.g. http://collector:4318/v1/traces. What it wants to be told is in OTEL_EXPORTER_OTLP_HEADERS.
        sample: share of the requests that are traced.
        content: whether texts and pictures are in the spans.
    """

    def __init__(self, endpoint: str, sample: float, content: bool) -> None:
        self._content = content
        self._exporter = Exporter(endpoint)
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say more about this process.
        resource = Resource.create({"service.name": "molmo-pipelines"}).merge(Resource.create())
        self._provider = TracerProvider(TraceIdRatioBased(sample), resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter, QUEUED_SPANS, max_export_batch_size=BATCH))
        self._spans = self._provider.get_tracer("molmo-pipelines")

    def begin(self, operation: str, path: str, headers: Mapping[str, str]) -> Trace | None:
        """The trace of a request; None: it is not in the sample. Goes on with the trace of the client, if the headers say which."""
        context = TraceContextTextMapPropagator().extract(headers)
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "molmo-pipelines",
            "http.request.method": "POST",
            "url.path": path,
        }
        root = self._spans.start_span(operation, context, otel.SpanKind.SERVER, attributes)
        return Trace(self._spans, root, operation, self._content, self._exporter.for_mlflow) if root.is_recording() else None

    def close(self) -> None:
        """Sends what is left, for at most `export.CLOSE_S` seconds."""
        self._exporter.close_soon()
        self._provider.shutdown()


class Trace:
    """The spans of one request."""

    def __init__(self, spans: otel.Tracer, root: otel.Span, operation: str, content: bool, for_mlflow: bool) -> None:
        self._spans, self._root, self._operation = spans, root, operation
        self.content, self.for_mlflow = content, for_mlflow
        self.status = 0
        """HTTP's; 0: nothing was sent."""
        self.attributes: dict[str, Any] = {}
        self._reasons: list[str] = []
        self._tokens = 0
        self._error: BaseException | None = None

    def model(self, name: str) -> None:
        """Who answers."""
        self._root.update_name(f"{self._operation} {name}")
        self.attributes |= {"gen_ai.request.model": name, "gen_ai.response.model": name}

    def add(
        self, name: str, begun: int, ended: int, parent: otel.Span | None = None, attributes: Mapping[str, int] | None = None
    ) -> otel.Span:
        """A part of the request, from and to nanoseconds since 1970."""
        span = self._spans.start_span(name, otel.set_span_in_context(parent or self._root), start_time=begun, attributes=attributes)
        span.end(max(begun, ended))
        return span

    def answer(self, begun: int, times: Times | None, prompt_tokens: int, tokens: int, reason: str, params: SamplingParams) -> None:
        """One answer that has ended now, and was asked for at `begun`."""
        ended = time.time_ns()
        if times is None:  # no token came
            self.add("queue", begun, ended)
        else:
            started = begun + _ns(times.queue)
            first = started + _ns(times.prefill)
            self.add("queue", begun, started)
            prefill = self.add("prefill", started, first, attributes={"gen_ai.usage.input_tokens": prompt_tokens})
            if times.vision:
                self.add("vision", started, started + _ns(times.vision), prefill)
            self.add("decode", first, ended, attributes={"gen_ai.usage.output_tokens": tokens})
        self._reasons.append(reason)
        self._tokens += tokens
        self.attributes |= {
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": self._tokens,
            "gen_ai.response.finish_reasons": self._reasons,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
        } | ({} if params.seed is None else {"gen_ai.request.seed": params.seed})

    def failed(self, error: BaseException) -> None:
        self._error = error

    def end(self) -> None:
        if self.status:
            self.attributes["http.response.status_code"] = self.status
        if self._error is not None or self.status >= 400:
            self.attributes["error.type"] = type(self._error).__name__ if self._error is not None else str(self.status)
        if self.status >= 500 or (isinstance(self._error, Exception) and not _of_client(self._error)):
            self._root.set_status(otel.StatusCode.ERROR)
        self._root.set_attributes(self.attributes)
        self._root.end()


class _Watched:
    """`Pieces` that are handed on, and told to a trace."""

    def __init__(self, pieces: Pieces, trace: Trace, prompt_tokens: int, params: SamplingParams) -> None:
        self._pieces, self._trace = pieces, trace
        self._prompt_tokens, self._params = prompt_tokens, params
        self._begun = time.time_ns()
        self._times: Times | None = None
        self._tokens = 0
        self._ended = False

    async def __anext__(self) -> Piece:
        try:
            piece = await self._pieces.__anext__()
        except BaseException as error:
            self._trace.failed(error)
            self._end("error")
            raise
        self._times = self._times or piece.times
        self._tokens += len(piece.tokens)
        if piece.finish_reason is not None:
            self._end(piece.finish_reason)
        return piece

    def cancel(self) -> object:
        """A stop string was found, or nobody waits any more."""
        self._end("stop")
        return self._pieces.cancel()

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self._trace.answer(self._begun, self._times, self._prompt_tokens, self._tokens, reason, self._params)


def _of_client(error: Exception) -> bool:
    """What a client did wrong is no error of a server."""
    return isinstance(error, ApiError) and error.status < 500


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
