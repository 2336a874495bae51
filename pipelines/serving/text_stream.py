"""From token ids to text that can be sent: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "�"  # what a tokenizer decodes the first bytes of a multi-byte character to
SETTLE_AFTER = 32
"""Tokens decoded together: long answers are not decoded from the beginning for every token."""


class TextStream:
    """The text of one answer while its tokens arrive, without blanks at its beginning.

    Args:
        decode: token ids to text.
        stops: strings that end the answer; they and what follows them are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._pending: list[int] = []  # tokens whose text may still change
        self._settled = ""
        self._text = ""
        self._sent = 0
        self.stopped = False
        """A stop string was met; later tokens are ignored."""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that has become certain."""
        if self.stopped:
            return ""
        self._pending.append(token)
        self._text = self._settled + self._decode(self._pending)
        if not self._settled:
            self._text = self._text.lstrip()  # models begin an answer with the blank that follows the role
        if len(self._pending) >= SETTLE_AFTER and not self._text.endswith(_INCOMPLETE):
            self._settled, self._pending = self._text, []
        found = [at for at in (self._text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]
            return self._send(len(self._text))
        certain = len(self._text.rstrip(_INCOMPLETE)) if self._text.endswith(_INCOMPLETE) else len(self._text)
        return self._send(certain - self._held_back(self._text[:certain]))

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        return self._send(len(self._text))

    def _send(self, end: int) -> str:
        new = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return new

    def _held_back(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
