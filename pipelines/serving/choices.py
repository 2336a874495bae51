"""The answers to one request on their way from the engine to the client: text, log-probabilities and points, as they become certain."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from molmo_core.generation.engine.requests import TokenLogprobs
from molmo_core.preprocessing.point_reader import PointTextReader
from pipelines.serving.pieces import Piece, Pieces
from pipelines.serving.points import PointReader
from pipelines.serving.text_stream import TextStream


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What has become certain of one answer."""

    index: int
    """Which answer of the request, from 0."""
    text: str
    logprobs: list[tuple[int, TokenLogprobs]]
    """Token ids and their log-probabilities, if they were asked for: of the tokens whose text has been sent."""
    points: list[dict[str, Any]]
    finish_reason: str | None
    """With the last part."""


class _Held(NamedTuple):
    """A token whose text has not been sent yet."""

    start: int
    end: int
    token: int
    logprobs: TokenLogprobs


class Choice:
    """One answer."""

    def __init__(
        self, index: int, pieces: Pieces, text: TextStream, points: PointReader, answer_reader: PointTextReader | None = None
    ) -> None:
        """`answer_reader`: makes text of tokens that stand for points; None: all tokens are text."""
        self.index = index
        self.tokens = 0
        """Generated so far."""
        self.ended = False
        self._pieces = pieces
        self._text = text
        self._points = points
        self._answer_reader = answer_reader
        self._held: collections.deque[_Held] = collections.deque()

    async def next(self) -> Part:
        """What comes next; not to be called after the end."""
        piece = await self._pieces.__anext__()
        text, finish_reason = self._push(piece), piece.finish_reason
        if self._text.stopped:
            finish_reason = "stop"
            self._pieces.cancel()
        elif finish_reason:
            for written in () if self._answer_reader is None else self._answer_reader.finish():
                text += self._text.push(written)
            text += self._text.finish()
        self.ended = finish_reason is not None
        return Part(self.index, text, self._released(), self._points.push(text), finish_reason)

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        if not self.ended:
            self.ended = True
            self._pieces.cancel()

    def _push(self, piece: Piece) -> str:
        text = ""
        for i, token in enumerate(piece.tokens):
            self.tokens += 1
            start = self._text.length
            for written in self._written(token, piece.places[i] if piece.places else -1):
                text += self._text.push(written)
            if piece.logprobs is not None:
                self._held.append(_Held(start, self._text.length, token, piece.logprobs[i]))
            if self._text.stopped:
                break
        return text

    def _written(self, token: int, place: int) -> list[int]:
        """The tokens of text that a token becomes."""
        return [token] if self._answer_reader is None else self._answer_reader.push(token, place)

    def _released(self) -> list[tuple[int, TokenLogprobs]]:
        """Log-probabilities of tokens whose text was sent; at the end those of text that a stop string cut off are dropped."""
        released = []
        sent = self._text.sent
        while self._held and (self._held[0].end <= sent or self.ended):
            held = self._held.popleft()
            if held.start < sent or held.start == held.end <= sent or not self._text.stopped:
                released.append((held.token, held.logprobs))
        return released


class Choices:
    """All answers of one request."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._choices = choices
        self._first: list[Part] = []

    def __len__(self) -> int:
        return len(self._choices)

    @property
    def tokens(self) -> int:
        """Generated so far, of all answers."""
        return sum(choice.tokens for choice in self._choices)

    async def begin(self) -> None:
        """Waits for the first part of each answer.

        Raises:
            Exception: one of them failed; the others are cancelled.
        """
        try:
            self._first = list(await asyncio.gather(*(choice.next() for choice in self._choices)))
        except BaseException:
            self.cancel()
            raise

    async def parts(self) -> AsyncIterator[Part]:
        """The parts of all answers in the order in which they come. Whoever stops asking, or an answer that fails, ends all of them."""
        waiting: dict[asyncio.Future[Part], Choice] = {}
        try:
            for part in self._first:
                yield part
            left = [choice for choice in self._choices if not choice.ended]
            if len(left) == 1:  # no need for tasks
                while not left[0].ended:
                    yield await left[0].next()
                return
            waiting = {asyncio.ensure_future(choice.next()): choice for choice in left}
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    choice = waiting.pop(future)
                    yield future.result()
                    if not choice.ended:
                        waiting[asyncio.ensure_future(choice.next())] = choice
        finally:
            for future in waiting:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # looked at: nobody else will
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        for choice in self._choices:
            choice.cancel()
