"""What stands around an engine: the thread it works in, the queue before it, and an asynchronous generator for each answer.

It knows the engine by `admit`, `step` and `active` only, and the requests not at all.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from molmo_core.generation.events import End, Event, Failed, Ticket, Token
from pipelines.serving.errors import queue_full, unavailable
from pipelines.serving.pieces import Piece

IDLE_WAIT_S = 0.2


class Engine(Protocol):
    """Generates the answers to many requests at once; used by one thread."""

    tokens: int
    """Generated so far."""

    @property
    def active(self) -> int:
        """Answers in work."""

    def admit(self, tickets: Sequence[Ticket]) -> None:
        """Begins with requests. What is wrong with one goes to its ticket."""

    def step(self) -> None:
        """A step of every answer in work; cancelled ones leave."""


class Host:
    """Runs an engine. `answer` is used from one event loop.

    Args:
        engine: not used by anyone else.
        max_batch_size: answers in work at a time.
        max_queued: requests that wait beyond those; the next one is refused.
        batch_wait_s: how long an idle engine waits for more requests before it starts on the first.
    """

    def __init__(self, engine: Engine, max_batch_size: int, max_queued: int, batch_wait_s: float) -> None:
        self._engine = engine
        self._max_batch_size = max_batch_size
        self._batch_wait_s = batch_wait_s
        self._places = max_batch_size + max_queued
        self._tickets: set[Ticket] = set()  # waiting or in work
        self._waiting: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def answer(self, request: Any) -> AsyncGenerator[Piece, None]:
        """The answer to one request, as it is generated. Closing the generator stops the work on it.

        Raises:
            ApiError: 429, the queue is full; 503, the engine has stopped.
            Exception: what made the engine fail on this request.
        """
        if len(self._tickets) >= self._places:
            raise queue_full()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = Ticket(request, emit)
        self._tickets.add(ticket)
        try:
            self._waiting.put(ticket)
            if not self._thread.is_alive():  # looked at after putting: a thread that ends now has told this ticket, too
                raise _stopped()
            piece = Piece([], None)
            while piece.finish_reason is None:
                ready = [await events.get()]
                while not events.empty():  # what has come meanwhile goes out as one part
                    ready.append(events.get_nowait())
                piece = _piece(ready)
                yield piece
        finally:
            ticket.cancelled = True
            self._tickets.discard(ticket)

    def load(self) -> dict[str, int]:
        """Answers in work (`active`), requests before them (`waiting`), and tokens generated since the start (`tokens`)."""
        return {"active": self._engine.active, "waiting": self._waiting.qsize(), "tokens": self._engine.tokens}

    def check(self) -> None:
        """Raises RuntimeError when the engine has stopped for good."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the engine has stopped: {self._failure!r}")

    def close(self) -> None:
        """Ends the thread after its current step."""
        self._closing.set()

    def _work(self) -> None:
        try:
            while not self._closing.is_set():
                self._engine.admit(self._arrived())
                self._engine.step()
        except BaseException as error:  # kept for `check`, which reports it
            self._failure = error
            raise
        finally:
            for ticket in tuple(self._tickets):
                ticket.emit(Failed(_stopped()))

    def _arrived(self) -> list[Ticket]:
        """Requests to begin with: those there now; an idle engine waits for the first, and a little for others."""
        room = self._max_batch_size - self._engine.active
        tickets: list[Ticket] = []
        deadline = time.monotonic() + (0 if self._engine.active else IDLE_WAIT_S)
        while len(tickets) < room:
            try:
                tickets.append(self._waiting.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
            if not self._engine.active and len(tickets) == 1:
                deadline = time.monotonic() + self._batch_wait_s
        return tickets


def _piece(events: Sequence[Event]) -> Piece:
    tokens: list[int] = []
    for event in events:
        match event:
            case Token(token):
                tokens.append(token)
            case End(reason):
                return Piece(tokens, reason)
            case Failed(error):
                raise error
    return Piece(tokens, None)


def _stopped() -> Exception:
    return unavailable("The model has stopped and is being replaced; try again.", "replica_lost")
