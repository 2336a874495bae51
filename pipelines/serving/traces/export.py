"""Sends spans by OTLP over HTTP; a receiver that does not take them costs a line in the log."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

_LIBRARY = logging.getLogger(trace_exporter.__name__)
TIMEOUT_S = 5.0
"""Longest time for sending a message, tries included."""
CLOSE_S = 2.0
"""How long a server that stops tries to send the rest."""


class Exporter(SpanExporter):
    """Sends spans, and says once when that does not work."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._inner = trace_exporter.OTLPSpanExporter(endpoint, timeout=TIMEOUT_S)
        self._reasons = _Reasons()
        _LIBRARY.addFilter(self._reasons)
        headers = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")
        self.for_mlflow = "x-mlflow-experiment-id" in headers.lower()
        """Whether the receiver is an MLflow server, which wants to be told the experiment."""
        self._failing = False
        self._last_chance = math.inf
        self._timer: threading.Timer | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if time.monotonic() > self._last_chance:
            return SpanExportResult.FAILURE
        result = self._inner.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            logger.warning("Traces do not reach %s and are dropped until they do: %s", self._endpoint, self._reasons.first)
        self._failing = failing
        self._reasons.first = ""
        return result

    def close_soon(self) -> None:
        """What cannot be sent in a moment is given up."""
        self._last_chance = time.monotonic() + CLOSE_S
        self._timer = threading.Timer(CLOSE_S, self._inner.shutdown)  # ends the wait before another try
        self._timer.daemon = True
        self._timer.start()

    def shutdown(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._inner.shutdown()
        _LIBRARY.removeFilter(self._reasons)


class _Reasons(logging.Filter):
    """Keeps what the library would log, twice and more for every message that fails."""

    first = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.first = self.first or record.getMessage()
        return False
