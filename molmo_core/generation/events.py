"""Between an engine and its host: a request with the one who waits for it, and what the engine says about the answer.

An answer is any number of `Token`s, then either its `End` or `Failed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Token(NamedTuple):
    """The next token of the answer."""

    id: int


class End(NamedTuple):
    """Nothing follows: an end token was drawn, or the answer has its greatest length."""

    reason: Literal["stop", "length"]


class Failed(NamedTuple):
    """Nothing follows: the answer cannot be completed."""

    error: Exception


Event = Token | End | Failed


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request on its way through an engine."""

    request: Any
    """What the engine takes."""
    emit: Callable[[Event], None]
    """Called with each event of the answer, by the engine's thread."""
    cancelled: bool = False
    """Set by the host, from any thread: nobody waits for the answer any more."""
