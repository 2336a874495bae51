"""An answer on its way from a replica to the client, as token ids. Light: both ends use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from molmo_core.generation.engine.requests import Times, TokenLogprobs


class Piece(NamedTuple):
    """A part of an answer."""

    tokens: list[int]
    finish_reason: str | None
    """`stop` or `length` with the last part."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each token, if the request asks for them."""
    times: Times | None = None
    """With the first token: where the time until then went."""
    places: list[int] | None = None
    """What each token stands for (`Token.place`), if one of them is a token of a point."""


class Pieces(Protocol):
    """The parts of one answer: an asynchronous iterator that can be stopped."""

    async def __anext__(self) -> Piece: ...

    def cancel(self) -> object: ...


Generate = Callable[..., Pieces]
"""Begins an answer: (example, SamplingParams)."""
