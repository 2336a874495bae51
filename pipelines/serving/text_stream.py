"""From token ids to text that can be sent: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "�"  # what a tokenizer decodes the first bytes of a multi-byte character to
SETTLE_AFTER = 32
"""Tokens decoded together: long answers are not decoded from the beginning for every token."""
_OPEN = 8
"""Of these, tokens in which a character may have begun that is not complete; it has four bytes at most."""


class TextStream:
    """The text of one answer while its tokens arrive, without blanks at its beginning.

    Args:
        decode: token ids to text.
        stops: strings that end the answer; they and what follows them are not part of it.
        include_stop: the stop string is part of it.
        min_tokens: a stop string that is complete before so many tokens does not count.
        strip: whether blanks at the beginning are left out.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        strip: bool = True,
    ) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._strip = strip
        self._tokens = 0
        self._free = 0  # where the text began in which a stop string counts when it ends there
        self._pending: list[int] = []  # tokens whose text may still change
        self._settled = ""
        self._text = ""
        self.sent = 0
        """Characters of the text that have been returned."""
        self.stopped = False
        """A stop string was met; later tokens are ignored."""

    @property
    def length(self) -> int:
        """Characters of the text so far."""
        return len(self._text)

    def push(self, token: int) -> str:
        """Adds a token; returns the text that has become certain."""
        if self.stopped:
            return ""
        self._tokens += 1
        if self._tokens <= self._min_tokens:
            self._free = len(self._text)
        self._pending.append(token)
        self._text = self._settled + self._decode(self._pending)
        if self._strip and not self._settled:
            self._text = self._text.lstrip()  # models begin an answer with the blank that follows the role
        if len(self._pending) >= SETTLE_AFTER:
            self._settle()
        end = self._stop() if self._tokens >= self._min_tokens else None
        if end is not None:
            self.stopped = True
            self._text = self._text[:end]
            return self._send(end)
        # However many bytes of a character there are, they are decoded to one mark: those before it stay.
        certain = len(self._text) - self._text.endswith(_INCOMPLETE)
        return self._send(certain - self._held_back(self._text[:certain]))

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        return self._send(len(self._text))

    def _settle(self) -> None:
        """Fixes text that further tokens do not change. Bytes that are no text must not make the rest longer and longer."""
        if not self._text.endswith(_INCOMPLETE):
            self._settled, self._pending = self._text, []
            return
        whole = self._decode(self._pending)
        for cut in range(len(self._pending) - _OPEN, len(self._pending) - _OPEN - 4, -1):
            rest = self._decode(self._pending[cut:])
            if self._decode(self._pending[:cut]) + rest == whole:
                self._settled, self._pending = self._text[: len(self._text) - len(rest)], self._pending[cut:]
                return

    def _stop(self) -> int | None:
        """Where the earliest stop string ends the text."""
        found = []
        for stop in self._stops:
            # What was sent is no beginning of a stop string, or it was held back.
            at = self._text.find(stop, max(self.sent, self._free - len(stop) + 1, 0))
            if at >= 0:
                found.append((at, at + len(stop) if self._include_stop else at))
        return min(found)[1] if found else None

    def _send(self, end: int) -> str:
        new = self._text[self.sent : end]
        self.sent = max(self.sent, end)
        return new

    def _held_back(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            at = max(self.sent, len(text) - len(stop) + 1)
            while (at := text.find(stop[0], at)) >= 0 and not stop.startswith(text[at:]):
                at += 1
            longest = max(longest, len(text) - at if at >= 0 else 0)
        return longest
