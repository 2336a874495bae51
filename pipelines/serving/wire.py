"""The way of tokens from replicas to frontends: one TCP connection for each pair of them, one message for each step of the engine.

An item of a Serve stream costs about a millisecond. Here the tokens that a step gives to all answers of a frontend travel together, and
both ends notice at once when the other one is gone. The Serve call that asked for the answer stays open until its end, so routing,
counting and cancelling are Serve's.

A frontend listens at its node's own address only. Who connects has to know its secret, which travels with the Serve call.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import secrets
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, cast

import msgpack

from molmo_core.generation.engine.requests import Times, TokenLogprobs
from pipelines.serving.pieces import Piece

_SECRET_BYTES = 32
_GREETING_S = 10.0
_LONGEST_MESSAGE = 64 << 20


class Address(NamedTuple):
    """Where a frontend receives."""

    host: str
    port: int
    secret: bytes


class ConnectionLost(Exception):
    """The other end is gone."""


class Inbox:
    """A frontend's end."""

    def __init__(self) -> None:
        self._takers: dict[int, Callable[[Piece | ConnectionLost], object]] = {}
        self._numbers = itertools.count()
        self._secret = secrets.token_bytes(_SECRET_BYTES)

    async def open(self, host: str) -> None:
        """Listens at an address of this machine, on a free port."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Receiver(self, self._secret), host, 0)
        self.address = Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    def expect(self, take: Callable[[Piece | ConnectionLost], object]) -> int:
        """The number of an answer; `take` is given its parts, or that the connection which they came by is gone."""
        number = next(self._numbers)
        self._takers[number] = take
        return number

    def forget(self, number: int) -> None:
        """What still comes for this answer is dropped."""
        self._takers.pop(number, None)

    def hand_out(self, number: int, part: Piece | ConnectionLost) -> None:
        """Gives a part to whoever expects it."""
        if take := self._takers.get(number):
            take(part)

    def close(self) -> None:
        self._server.close()


class _Receiver(asyncio.Protocol):
    """A connection from a replica."""

    def __init__(self, inbox: Inbox, secret: bytes) -> None:
        self._inbox, self._secret = inbox, secret
        self._greeting = b""
        self._known = False
        self._unpacker = msgpack.Unpacker(max_buffer_size=_LONGEST_MESSAGE)
        self._numbers: set[int] = set()  # answers that have not ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        asyncio.get_running_loop().call_later(_GREETING_S, lambda: None if self._known else transport.close())

    def data_received(self, data: bytes) -> None:
        if not self._known:
            self._greeting += data
            if len(self._greeting) < _SECRET_BYTES:
                return
            if not hmac.compare_digest(self._greeting[:_SECRET_BYTES], self._secret):
                self._transport.close()
                return
            self._known, data = True, self._greeting[_SECRET_BYTES:]
        self._unpacker.feed(data)
        for message in self._unpacker:
            for number, tokens, finish_reason, logprobs, times, places in message:
                written_out = logprobs and [TokenLogprobs(*of_token) for of_token in logprobs]
                piece = Piece(tokens, finish_reason, written_out, times and Times(*times), places)
                (self._numbers.add if piece.finish_reason is None else self._numbers.discard)(number)
                self._inbox.hand_out(number, piece)

    def connection_lost(self, error: Exception | None) -> None:
        for number in self._numbers:
            self._inbox.hand_out(number, ConnectionLost())


class Outbox(asyncio.Protocol):
    """A replica's end of a connection to one frontend."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._parts: list[tuple[object, ...]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._transport.write(self._secret)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        for task in self._tasks:
            task.cancel()

    def send(self, number: int, piece: Piece) -> None:
        """Sends a part of an answer, together with all that are given until the event loop comes round again."""
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        self._parts.append((number, *piece))

    def _flush(self) -> None:
        if not self.lost:
            self._transport.write(msgpack.packb(self._parts))
        self._parts.clear()

    @contextlib.asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """What is done in this block is cancelled when nobody is there any more to receive it.

        Raises:
            ConnectionLost: that has happened.
        """
        task = asyncio.current_task()
        assert task is not None
        if self.lost:
            raise ConnectionLost
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self.lost and not task.uncancel():
                raise ConnectionLost from None
            raise
        finally:
            self._tasks.discard(task)


class Outboxes:
    """A replica's connections to frontends, opened when first used."""

    def __init__(self) -> None:
        self._opening: dict[Address, asyncio.Task[Outbox]] = {}

    async def to(self, address: Address) -> Outbox:
        """The connection to a frontend.

        Raises:
            OSError: nobody is there.
        """
        for other in [a for a, opening in self._opening.items() if _is_lost(opening)]:
            del self._opening[other]
        if address not in self._opening:
            self._opening[address] = asyncio.ensure_future(_connect(address))
        return await asyncio.shield(self._opening[address])


def _is_lost(opening: asyncio.Task[Outbox]) -> bool:
    return opening.done() and (opening.cancelled() or opening.exception() is not None or opening.result().lost)


async def _connect(address: Address) -> Outbox:
    loop = asyncio.get_running_loop()
    _, outbox = await loop.create_connection(lambda: Outbox(address.secret), address.host, address.port)
    return outbox
