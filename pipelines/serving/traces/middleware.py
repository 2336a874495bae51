"""Where traces begin and end: around the routes that answer."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.config import ServeConfig
from pipelines.serving.traces.spans import Tracer, current

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion"}
"""What is traced: the routes, and the name of what they do."""


class Traced:
    """ASGI middleware: traces what the routes of `OPERATIONS` do.

    Args:
        app: the application.
        tracer: asked for each request; None = no traces.
    """

    def __init__(self, app: ASGIApp, tracer: Callable[[], Tracer | None]) -> None:
        self._app, self._tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = OPERATIONS.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        tracer = None if operation is None else self._tracer()
        trace = None if tracer is None or operation is None else tracer.begin(operation, scope["path"], _headers(scope))
        if trace is None:
            await self._app(scope, receive, send)
            return

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            await send(message)

        token = current.set(trace)
        try:
            await self._app(scope, receive, watched_send)
        except BaseException as error:
            trace.failed(error)
            raise
        finally:
            current.reset(token)
            trace.end()


def tracer(config: ServeConfig) -> Tracer | None:
    """What traces a server of this configuration; None: it has no traces."""
    if config.trace_endpoint is None or not config.trace_sample:
        return None
    return Tracer(config.trace_endpoint, config.trace_sample, config.trace_content)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
