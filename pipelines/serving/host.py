"""What is around an engine: the thread it works in, the queue before it, and who is told of each answer.

The engine owns the queue; the host bounds it, and refuses what would make it longer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from molmo_core.generation.engine.requests import End, Event, Failed, Token
from pipelines.serving.errors import queue_full, unavailable
from pipelines.serving.pieces import Piece

IDLE_WAIT_S = 0.2
TELL_S = 0.0002
"""Tokens are handed on at most this often for each answer in work: with 128 answers every 26 ms. Each time costs the engine's thread the
interpreter, and clients work that nobody sees."""


class Engine(Protocol):
    """Generates the answers to many requests at once; used by one thread. Requests are told apart by identity."""

    @property
    def tokens(self) -> int:
        """Generated so far."""

    @property
    def active(self) -> int:
        """Requests that wait or are in work."""

    @property
    def running(self) -> int:
        """Those in work."""

    def add(self, request: Any) -> None:
        """Puts a request into the queue; raises ValueError if it cannot be answered."""

    def abort(self, request: Any) -> None:
        """Nobody waits for the answer any more. Nothing happens if it has ended."""

    def step(self) -> Sequence[tuple[Any, Event]]:
        """A step of every answer in work: what happened, in order."""


@dataclasses.dataclass(eq=False)
class _Ticket:
    """A request and the one who waits for its answer."""

    request: Any
    give: Callable[[Piece], object]
    ended: asyncio.Future[None]
    told: bool = False
    """When its first token came."""

    def take(self, events: Sequence[Event]) -> None:
        """Hands on what happened to the request in a step."""
        if self.ended.done():
            return
        given = [event for event in events if isinstance(event, Token)]
        tokens, logprobs = [token.id for token in given], [token.logprobs for token in given if token.logprobs is not None]
        places = [token.place for token in given] if any(token.place >= 0 for token in given) else None
        times = None if self.told else self.request.times
        self.told = True
        match events[-1]:
            case Failed(error):
                self.ended.set_exception(error)
            case End(reason):
                self.give(Piece(tokens, reason, logprobs or None, times, places))
                self.ended.set_result(None)
            case _:
                self.give(Piece(tokens, None, logprobs or None, times, places))


class Host:
    """Runs an engine. `answer` is used from one event loop.

    Args:
        engine: not used by anyone else.
        places: requests that wait or are in work; the next one is refused.
        batch_wait_s: how long an idle engine waits for more requests before it starts on the first.
    """

    def __init__(self, engine: Engine, places: int, batch_wait_s: float) -> None:
        self._engine = engine
        self._places = places
        self._batch_wait_s = batch_wait_s
        self._tickets: set[_Ticket] = set()  # waiting or in work
        self._arrived: queue.SimpleQueue[_Ticket] = queue.SimpleQueue()
        self._left: queue.SimpleQueue[_Ticket] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def answer(self, request: Any, give: Callable[[Piece], object]) -> None:
        """Generates the answer to one request; returns after its last part. Cancelling this stops the work on it.

        Args:
            give: called in this event loop with each part, once a step of the engine.

        Raises:
            ApiError: 429, the queue is full; 503, the engine has stopped.
            Exception: what made the engine fail on this request.
        """
        if len(self._tickets) >= self._places:
            raise queue_full()
        self._loop = asyncio.get_running_loop()
        ticket = _Ticket(request, give, self._loop.create_future())
        self._tickets.add(ticket)
        try:
            self._arrived.put(ticket)
            if not self._thread.is_alive():  # looked at after putting: a thread that ends now has told this ticket, too
                raise _stopped()
            await ticket.ended
        finally:
            self._tickets.discard(ticket)
            self._left.put(ticket)

    def load(self) -> dict[str, int]:
        """Answers in work (`active`), requests before them (`waiting`), and tokens generated since the start (`tokens`)."""
        running = self._engine.running
        return {"active": running, "waiting": max(0, len(self._tickets) - running), "tokens": self._engine.tokens}

    def check(self) -> None:
        """Raises RuntimeError when the engine has stopped for good."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the engine has stopped: {self._failure!r}")

    def close(self) -> None:
        """Ends the thread after its current step."""
        self._closing.set()

    def _work(self) -> None:
        tickets: dict[Any, _Ticket] = {}  # by request, of those that the engine has
        events: list[tuple[_Ticket, Event]] = []  # not told yet
        told = time.monotonic()
        try:
            while not self._closing.is_set():
                for ticket in self._new():
                    if ticket not in self._tickets:
                        continue  # whoever asked has left before the engine heard of it
                    try:
                        self._engine.add(ticket.request)
                        tickets[ticket.request] = ticket
                    except ValueError as error:
                        events.append((ticket, Failed(error)))
                while not self._left.empty():
                    request = self._left.get().request
                    if tickets.pop(request, None) is not None:
                        self._engine.abort(request)
                for request, event in self._engine.step():
                    if request in tickets:
                        events.append((tickets[request], event))
                        if not isinstance(event, Token):
                            del tickets[request]
                if self._engine.active and time.monotonic() - told < TELL_S * len(tickets):
                    continue
                self._tell(events)
                events, told = [], time.monotonic()
        except BaseException as error:  # kept for `check`, which reports it
            self._failure = error
            raise
        finally:
            ended = {ticket for ticket, event in events if not isinstance(event, Token)}
            self._tell(events + [(ticket, Failed(_stopped())) for ticket in self._tickets.copy() - ended])

    def _tell(self, events: list[tuple[_Ticket, Event]]) -> None:
        """Hands events to the event loop at once: waking it up costs the engine more than many a token."""
        if events and self._loop is not None:
            self._loop.call_soon_threadsafe(_hand_out, events)

    def _new(self) -> list[_Ticket]:
        """Requests that have arrived; an idle engine waits for the first, and a little for others."""
        tickets: list[_Ticket] = []
        deadline = time.monotonic() + (0 if self._engine.active else IDLE_WAIT_S)
        while True:
            try:
                tickets.append(self._arrived.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return tickets
            if not self._engine.active and len(tickets) == 1:
                deadline = time.monotonic() + self._batch_wait_s


def _hand_out(events: list[tuple[_Ticket, Event]]) -> None:
    of_ticket: dict[_Ticket, list[Event]] = {}
    for ticket, event in events:
        of_ticket.setdefault(ticket, []).append(event)
    for ticket, own in of_ticket.items():
        ticket.take(own)


def _stopped() -> Exception:
    return unavailable("The model has stopped and is being replaced; try again.", "replica_lost")
