"""What Prometheus is told: each process counts for itself, and every frontend can show the numbers of all of them.

Processes report to one collector (a small deployment) every two seconds, and get what the others have reported. So a scrape asks
nobody: it is answered at once, however busy the model is. A process that reports no more is left out after ten seconds; its label
`process` keeps its counters apart from those of the one that replaces it.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

REPORT_S = 2.0
FORGET_S = 10.0
_ARRIVED: contextvars.ContextVar[float] = contextvars.ContextVar("arrived")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0, 5.0)


class FrontendMetrics:
    """Numbers of one frontend."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry, "namespace": "molmo"}
        self.requests = Counter("requests", "HTTP requests by route and status; 429 are refusals.", ("route", "status"), **of)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From the request's arrival to the first token.", ("model",), buckets=_SECONDS, **of
        )
        self.token = Histogram("time_per_token_seconds", "Between two tokens of an answer.", ("model",), buckets=_TOKEN_SECONDS, **of)
        self.answer = Histogram("answer_seconds", "From the request's arrival to the answer's end.", ("model",), buckets=_SECONDS, **of)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts, media included.", ("model",), **of)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers.", ("model",), **of)
        self.lost = Counter("lost_replicas", "Answers that lost their replica and went on at another one.", ("model",), **of)
        self.media = Histogram("media_seconds", "Decoding and preparing a medium, with waiting for a place.", buckets=_SECONDS, **of)

    def timed(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The same asynchronous function of one argument, its time counted as that of a medium."""

        async def timed(task: Any) -> Any:
            with self.media.time():
                return await run(task)

        return timed

    def begin(self, model: str, prompt_tokens: int) -> AnswerWatch:
        """An answer begins."""
        self.prompt_tokens.labels(model).inc(prompt_tokens)
        return AnswerWatch(self, model)


class AnswerWatch:
    """Counts one answer."""

    def __init__(self, metrics: FrontendMetrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._arrived = _ARRIVED.get(time.monotonic())
        self._last: float | None = None

    def part(self, tokens: int, ended: bool) -> None:
        """A part of it has come."""
        now = time.monotonic()
        if tokens:
            if self._last is None:
                self._metrics.first_token.labels(self._model).observe(now - self._arrived)
            else:
                self._metrics.token.labels(self._model).observe((now - self._last) / tokens)
            self._last = now
            self._metrics.generated_tokens.labels(self._model).inc(tokens)
        if ended:
            self._metrics.answer.labels(self._model).observe(now - self._arrived)

    def lost(self) -> None:
        """Its replica is gone, and another one goes on."""
        self._metrics.lost.labels(self._model).inc()


class Counted:
    """ASGI middleware: counts requests by route and status, and notes when each arrived.

    Args:
        app: the application.
        metrics: asked for each request.
    """

    def __init__(self, app: ASGIApp, metrics: Callable[[], FrontendMetrics]) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _ARRIVED.set(time.monotonic())

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics().requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


_ENGINE = {
    "running": (GaugeMetricFamily, "Answers in work."),
    "waiting": (GaugeMetricFamily, "Requests that wait for a place in the batch."),
    "pages_used": (GaugeMetricFamily, "Pages of the key/value cache that answers in work hold."),
    "pages_total": (GaugeMetricFamily, "Pages of the key/value cache."),
    "feature_bytes": (GaugeMetricFamily, "Bytes of the features of media that are kept."),
    "tokens": (CounterMetricFamily, "Tokens generated."),
    "prompt_tokens": (CounterMetricFamily, "Tokens of prompts that were taken into work."),
    "prefix_tokens": (CounterMetricFamily, "Those of them that were in the cache already."),
    "preemptions": (CounterMetricFamily, "Answers that gave up their pages for a while."),
    "feature_hits": (CounterMetricFamily, "Prompts whose media had been seen."),
    "feature_misses": (CounterMetricFamily, "Prompts whose media had not been seen."),
}


class EngineMetrics:
    """Numbers of one replica: those of `EngineStats`, as they are when asked for."""

    def __init__(self, model: str, stats: Callable[[], Mapping[str, int]]) -> None:
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[Metric]:
        for name, value in self._stats().items():
            kind, text = _ENGINE[name]
            family = kind(f"molmo_engine_{name}", text, labels=("model",))
            family.add_metric((self._model,), value)
            yield family


class Source(Protocol):
    """A registry of prometheus_client, or something like it."""

    def collect(self) -> Iterable[Metric]: ...


class Collector:
    """The deployment that all processes report to."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, list[Metric]]] = {}

    async def report(self, process: str, families: list[Metric]) -> dict[str, list[Metric]]:
        """Takes the numbers of a process; returns those of all that have reported lately."""
        now = time.monotonic()
        self._reports[process] = (now, families)
        self._reports = {name: report for name, report in self._reports.items() if now - report[0] < FORGET_S}
        return {name: families for name, (_, families) in self._reports.items()}


class Reporter:
    """Reports the numbers of this process for as long as it lives.

    Args:
        collector: handle of the `Collector`.
        process: name of this process.
        source: its numbers.
    """

    def __init__(self, collector: Any, process: str, source: Source) -> None:
        self._collector, self._process, self._source = collector, process, source
        self._all: dict[str, list[Metric]] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="metrics", daemon=True).start()

    def exposition(self) -> bytes:
        """The numbers of all processes in Prometheus' text format; those of this one as they are now."""
        families: dict[str, Metric] = {}
        for process, metrics in {**self._all, self._process: list(self._source.collect())}.items():
            for metric in metrics:
                merged = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    if not sample.name.endswith("_created"):
                        merged.samples.append(sample._replace(labels={**sample.labels, "process": process}))
        return generate_latest(_Families(list(families.values())))  # type: ignore[arg-type]

    def close(self) -> None:
        self._closed.set()

    def _work(self) -> None:
        failing = False
        while not self._closed.wait(REPORT_S):
            try:
                self._all = self._collector.report.remote(self._process, list(self._source.collect())).result(timeout_s=FORGET_S)
                failing = False
            except Exception as error:  # of whatever keeps the collector from answering: it will be there again
                if not failing:
                    logger.warning("Metrics could not be reported: %s: %s", type(error).__name__, error)
                failing = True


class _Families:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
