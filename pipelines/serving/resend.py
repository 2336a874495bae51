"""What the HTTP proxy does when a frontend is lost: it asks another one, or ends the stream with an error event.

Serve's proxy gives a request to one frontend. If that process ends before it has answered, the proxy says nothing, of which its HTTP
server makes a bare 500; a stream breaks off. `environment.WORKER` puts this before the proxy. Frontends store nothing, so a request may
be sent again as long as nothing of its answer has gone out.
"""

from __future__ import annotations

import asyncio
import json

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.errors import unavailable

ATTEMPTS = 4
"""Frontends that may be lost during a request, less one: a request that itself ends them must not end all of them."""
PAUSE_S = 0.2
"""Before another one is asked."""
HELD_BYTES = 512 << 20
"""Bodies of requests that have no answer yet, together; what goes beyond is not sent again."""


def middleware() -> list[Middleware]:
    """For Serve, which asks for it in each process that takes HTTP requests."""
    return [Middleware(Resend)]


class Resend:
    """ASGI middleware before an application that may return without having answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.held = 0
        """Bytes of bodies."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(self, receive, send)
        try:
            for _ in range(ATTEMPTS):
                await self._app(dict(scope), exchange.receiver(), exchange.send)
                if not exchange.may_begin_anew:
                    break
                await asyncio.sleep(PAUSE_S)
        finally:
            exchange.release()
        if exchange.ended or exchange.client_left:
            return
        lost = unavailable("The process that worked on this request was lost; try again.", "frontend_lost")
        if not exchange.begun:
            await JSONResponse(lost.body(), lost.status, headers=lost.headers)(scope, receive, send)
        elif exchange.is_stream:
            name = "event: error\n" if scope["path"].endswith("/responses") else ""  # as their formats name it
            event = f"{name}data: {json.dumps({'type': 'error', **lost.body()})}\n\n"
            await send({"type": "http.response.body", "body": event.encode(), "more_body": False})


class _Exchange:
    """A request as far as it was read, and its answer as far as it was sent."""

    def __init__(self, resend: Resend, receive: Receive, send: Send) -> None:
        self._resend, self._receive, self._send = resend, receive, send
        self._read: list[Message] | None = []  # None: it is not held (any more)
        self._size = 0
        self._start: Message | None = None
        self.client_left = self.begun = self.ended = self.is_stream = False

    @property
    def may_begin_anew(self) -> bool:
        """What was read of the request is here, and nothing of an answer has gone out."""
        return not self.begun and not self.client_left and self._read is not None

    def receiver(self) -> Receive:
        """Gives the request from its beginning."""
        read = iter(tuple(self._read or ()))

        async def receive() -> Message:
            for message in read:
                return message
            message = await self._receive()
            self._hold(message)
            return message

        return receive

    def _hold(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self.client_left = True
        elif self._read is not None:
            size = len(message.get("body", b""))
            self._read.append(message)
            self._size += size
            self._resend.held += size
            if self._resend.held > HELD_BYTES:
                self.release()

    def release(self) -> None:
        """The request will not be sent again."""
        self._resend.held -= self._size
        self._read, self._size = None, 0

    async def send(self, message: Message) -> None:
        """Sends a part of the answer; its head goes with the first part of its body: until then another frontend can be asked."""
        if message["type"] == "http.response.start":
            self._start = message
            self.is_stream = any(name.lower() == b"content-type" and b"event-stream" in value for name, value in message["headers"])
            return
        if self._start is not None:
            self.begun = True
            self.release()
            await self._send(self._start)
            self._start = None
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)
