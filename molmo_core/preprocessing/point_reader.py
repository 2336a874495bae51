"""From tokens that stand for points to tokens of text with coordinates, in the form of Molmo2.

    <points coords="[T][V][L]1[T][V][L]2[T]">dogs</point>   ->   <points coords="1 1 123 456 2 789 012">dogs</points>

Whoever reads the answer then needs not know the model. Works while tokens arrive.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from molmo_core.preprocessing.point_places import PointPlaces
from molmo_core.preprocessing.point_tokens import LIST_START
from molmo_core.preprocessing.points import HTML_SCALE
from molmo_core.tokens import NO_MORE_POINTS

_CLOSE = "</point>"
_TAIL = 24
"""Characters of the text so far that are kept: enough for what begins a list."""


class TextTokenizer(Protocol):
    """What reading needs of a `Tokenizer`."""

    point_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, truncate_at_eos: bool = True) -> str: ...


class PointTextReader:
    """Rewrites the tokens of one answer.

    A point is written when its number is known, which stands behind it or before it. Points that are nowhere (a patch that is absent) are
    left out, with their numbers.
    """

    def __init__(self, tokenizer: TextTokenizer, places: PointPlaces | None):
        """`places`: what can be pointed at in the prompt; None: nothing, and points are left out."""
        self._tokenizer, self._places = tokenizer, places
        self._chosen: list[int] = []
        """Of the point that is being read: image token, patch, cell."""
        self._point: tuple[int, float, float] | None = None
        """A complete point without its number: image or frame, x, y."""
        self._waits = False
        """There is a complete point (that may be nowhere) without its number."""
        self._in_list = False
        self._held: list[int] = []
        """Tokens of text that may be a number, or the beginning of the end of a tag."""
        self._tail = ""
        self._kind = "points"
        self._block: int | None = None

    def push(self, token: int, place: int = -1) -> list[int]:
        """Adds a token and what it stands for (-1: text); returns tokens of text that have become certain."""
        if place < 0:
            return self._text(token)
        first, second, third = self._tokenizer.point_token_ids
        if token == first:
            out = self._number() if self._waits else []
            self._chosen = [] if place == NO_MORE_POINTS else [place]
            if place == NO_MORE_POINTS and self._in_list:
                self._held = []  # the number that would have been the next point's
            return out
        if token in (second, third) and self._chosen:
            self._chosen.append(place)
        last = third if self._has_cells else second
        return self._complete() if token == last and self._chosen else []

    def finish(self) -> list[int]:
        """The rest, at the end of the answer."""
        out = self._number() if self._waits else []
        held, self._held = self._held, []
        return out + held

    @property
    def _has_cells(self) -> bool:
        return self._places is None or self._places.cells

    def _complete(self) -> list[int]:
        token, slot, *cell = self._chosen
        self._chosen = []
        self._point = None if self._places is None else self._places.point(token, slot, cell[0] if cell else None)
        self._waits = True
        before = self._tokenizer.decode(self._held, truncate_at_eos=False).strip()
        return self._number() if before.isdigit() else []  # else its number follows

    def _text(self, token: int) -> list[int]:
        self._held.append(token)
        text = self._tokenizer.decode(self._held, truncate_at_eos=False)
        if self._in_list:
            if not text.strip(" 0123456789"):
                return []  # a number that may go on
            self._in_list = False
            out = self._number(text) if self._waits else []
            return out + self._closed(self._tokenizer.decode(self._held, truncate_at_eos=False))
        return self._closed(text)

    def _closed(self, text: str) -> list[int]:
        """Hands out held text, with the tag's end as it is in Molmo2."""
        if _CLOSE in text:
            before, after = text.split(_CLOSE, 1)
            closed = f"{before}</{self._kind}>"
            self._held, self._block = [], None
            return self._sent(closed, self._tokenizer.encode(closed)) + (self._closed_rest(after) if after else [])
        if any(text.endswith(_CLOSE[:size]) for size in range(len(_CLOSE) - 1, 0, -1)):
            return []
        held, self._held = self._held, []
        return self._sent(text, held)

    def _closed_rest(self, text: str) -> list[int]:
        self._held = self._tokenizer.encode(text)
        return self._closed(text)

    def _sent(self, text: str, tokens: list[int]) -> list[int]:
        self._tail = (self._tail + text)[-_TAIL:]
        if self._tail.endswith(LIST_START):
            self._in_list = True
            self._kind = "tracks" if "<tracks" in self._tail else "points"
            self._block = None
        return tokens

    def _number(self, text: str | None = None) -> list[int]:
        """Writes the point that waits, with the number that the held text begins with; the rest of that text stays held."""
        text = self._tokenizer.decode(self._held, truncate_at_eos=False) if text is None else text
        digits = text.strip()[: len(text.strip()) - len(text.strip().lstrip("0123456789"))]
        rest = text.strip()[len(digits) :]
        self._held = self._tokenizer.encode(rest) if rest else []
        self._waits, point, self._point = False, self._point, None
        self._in_list = self._in_list or not rest
        if point is None or not digits or self._places is None:
            return []
        block, x, y = point
        coordinates = f" {digits} {round(x * HTML_SCALE):03d} {round(y * HTML_SCALE):03d}"
        if block != self._block:
            key = block + 1 if self._places.times is None else f"{self._places.times[block]:.1f}"
            coordinates = f"{'' if self._block is None else ';'}{key}{coordinates}"
            self._block = block
        return self._tokenizer.encode(coordinates)


def read_points(reader: PointTextReader, tokens: Iterable[int], chosen: Iterable[int]) -> list[int]:
    """A whole answer rewritten: its tokens, and what each stands for (missing at the end: text)."""
    result: list[int] = []
    values = iter(chosen)
    for token in tokens:
        result += reader.push(int(token), int(next(values, -1)))
    return result + reader.finish()
