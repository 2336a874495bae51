"""Points as tokens that stand for what was chosen, and the text around them.

    <points coords="[T][V][L]1[T][V][L]2[T]">dogs</point>

[T], [V] and [L] are the three tokens of a point (which image token, patch and cell they stand for is not in the text); the number of a
point, or of a tracked object, follows it or precedes it; a [T] alone ends the list. In the texts here three reserved characters stand for
the tokens; `messages` turns them into ids.

Source: the published MolmoPoint code (closing tag included).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from molmo_core.preprocessing.point_places import PointPlaces
from molmo_core.preprocessing.points import NO_TRACKS_TEXT, NONE_TEXT, Point, Tag, complete_tags
from molmo_core.tokens import NO_MORE_POINTS

LIST_START = 'coords="'
MARKS = "\ufdd1\ufdd2\ufdd3"
"""Stand for the tokens of a point; Unicode reserves these characters for use inside a program."""


class PointTokenizer(Protocol):
    """What points need of a `Tokenizer`."""

    point_token_ids: tuple[int, ...]


Numbering = Literal["no_space_id_last", "space_id_last", "no_space"]
RemoveRepeats = Literal["all", "subpatch"]


@dataclasses.dataclass(frozen=True)
class PointStyle:
    """How lists of points are written."""

    cells: bool = True
    """A point has a cell."""
    ends: bool = True
    """A list ends with a token of its own."""
    in_order: bool = True
    """Points are in the order of image tokens; otherwise shuffled."""
    remove_repeats: RemoveRepeats | None = None
    """Points that are chosen alike are one (`all`), or those on one patch are (`subpatch`; one of them is drawn)."""
    numbering: Numbering = "no_space_id_last"


def chosen_points(tokens: Iterable[int], places: Iterable[int], tokenizer: PointTokenizer) -> np.ndarray:
    """The complete points of generated tokens: int64 [n, 3], image token, patch and cell (-1: points have none).

    Args:
        tokens: ids of an answer (or a part of it).
        places: what each of them stands for, as `generate` gives it; -1 for text.
        tokenizer: of the model.
    """
    first, second, third = tokenizer.point_token_ids
    rows: list[list[int]] = []
    for token, place in zip(map(int, tokens), map(int, places)):
        if place < 0:
            continue
        if token == first:
            rows.append([place, -1, -1])
        elif token in (second, third) and rows:
            rows[-1][1 if token == second else 2] = place
    width = 3 if any(row[2] >= 0 for row in rows) else 2
    rows = [row for row in rows if row[0] != NO_MORE_POINTS and row[width - 1] >= 0]
    return np.array(rows, np.int64).reshape(-1, 3)


class PointWriter:
    """Writes the points of one example; `taken` gives what their tokens stand for."""

    def __init__(self, style: PointStyle, places: PointPlaces, rng: np.random.RandomState):
        self.style, self.places, self.rng = style, places, rng
        self._rows: list[tuple[int, int, int]] = []

    def taken(self) -> np.ndarray | None:
        """int64 [n, 3] of the tokens written since the last call: image token, patch, cell, -1 = absent; None: no points were written."""
        rows, self._rows = self._rows, []
        return np.array(rows, np.int64) if rows else None

    def points(self, blocks: Sequence[tuple[float, np.ndarray]], label: str) -> str:
        """A list of points.

        Args:
            blocks: (image number from 1, or seconds; shares of width and height [n, 2]).
            label: what is pointed at.
        """
        chosen = self._located(blocks)
        if not chosen:
            return NONE_TEXT
        if self.style.remove_repeats == "all":
            chosen = list(dict.fromkeys(chosen))
        elif self.style.remove_repeats == "subpatch":
            by_patch: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
            for triple in chosen:
                by_patch.setdefault(triple[:2], []).append(triple)
            chosen = [same[self.rng.randint(len(same))] for same in by_patch.values()]
        if self.style.in_order:
            chosen.sort()
        else:
            self.rng.shuffle(chosen)  # type: ignore[arg-type]
        return self._tag("points", chosen, range(1, len(chosen) + 1), label)

    def count(self, blocks: Sequence[tuple[float, np.ndarray]]) -> int:
        """How many points the list has that `points` writes of these."""
        chosen = self._located(blocks)
        if self.style.remove_repeats is None:
            return len(chosen)
        return len({triple if self.style.remove_repeats == "all" else triple[:2] for triple in chosen})

    def tracks(self, frames: Sequence[tuple[float, Mapping[Any, np.ndarray | None]]], label: str) -> str:
        """Tracked objects: (seconds, {object: (x, y) as shares, or None while it is hidden}); numbered by their first appearance."""
        names: dict[Any, int] = {}
        found = []
        for seconds, objects in frames:
            for name, xy in objects.items():
                number = names.setdefault(name, len(names))
                if xy is not None:
                    found.append((self.places.locate(self._block(float(seconds)), *np.clip(xy, 0, 1).tolist()), number))
        if not found:
            return NO_TRACKS_TEXT
        found.sort()
        numbers: dict[int, int] = {}
        for _, number in found:
            numbers.setdefault(number, len(numbers) + 1)
        return self._tag("tracks", [triple for triple, _ in found], [numbers[number] for _, number in found], label)

    def rewritten(self, text: str, leave: bool = False) -> str:
        """An answer whose points are written as text (as Molmo and Molmo2 write them), with tokens in their place.

        Args:
            text: of the answer.
            leave: points that are nowhere stay as they are written; otherwise they are an error.

        Raises:
            ValueError: points outside the image, or in an image or at a time that there is not.
        """
        parts, end = [], 0
        for tag in complete_tags(text):
            if not tag.points and not tag.outside:
                continue
            try:
                written = self._of_tag(tag)
            except ValueError:
                if not leave:
                    raise
                continue
            parts += [text[end : tag.start], written]
            end = tag.end
        return "".join([*parts, text[end:]])

    def _of_tag(self, tag: Tag) -> str:
        if tag.outside:
            raise ValueError(f"{tag.outside} point(s) outside the image in the tag of {tag.label!r}")
        blocks: dict[float, list[Point]] = {}
        for point in tag.points:
            blocks.setdefault(self._key(point.block), []).append(point)
        if tag.kind == "tracks":
            frames = [(key, {point.id: np.array((point.x, point.y)) for point in points}) for key, points in blocks.items()]
            return self.tracks(frames, tag.label or "")
        return self.points([(key, np.array([(point.x, point.y) for point in points])) for key, points in blocks.items()], tag.label or "")

    def _key(self, block: float | None) -> float:
        """The image's number or the time that a written point names."""
        if block is None:
            if self.places.times is not None or len(self.places.grids) != 1:
                raise ValueError("a point that does not say in which image or at what time it is")
            return 1
        return block if self.places.times is not None or block != int(block) else int(block)

    def _located(self, blocks: Sequence[tuple[float, np.ndarray]]) -> list[tuple[int, int, int]]:
        return [self.places.locate(self._block(key), x, y) for key, points in blocks for x, y in points.tolist()]

    def _block(self, key: float) -> int:
        """The image or frame of a block.

        Raises:
            ValueError: seconds where there are images, or further from all frames than these are from each other (at least a second).
        """
        times = self.places.times
        if times is None:
            if not isinstance(key, int):
                raise ValueError("points at times need a video; this example has images")
            return key - 1
        frame = self.places.frame_at(float(key))
        if abs(times[frame] - key) > max(1.0, np.diff(times).max(initial=0.0)):
            raise ValueError(f"a point at {key:g} s, but the frames are from {times[0]:g} to {times[-1]:g} s")
        return frame

    def _tag(self, kind: str, chosen: Sequence[tuple[int, int, int]], numbers: Sequence[int], label: str) -> str:
        style, token = self.style, MARKS[0]
        mark = MARKS if style.cells else MARKS[:2]
        last, separator = style.numbering != "no_space", " " if style.numbering == "space_id_last" else ""
        parts = [f"{mark}{separator}{n}" if last else f"{n}{mark}" for n in numbers]
        self._rows += [triple if style.cells else (*triple[:2], -1) for triple in chosen]
        if style.ends:
            self._rows.append((NO_MORE_POINTS, -1, -1))
            parts.append(token if last else f"{len(chosen) + 1}{token}")
        return f'<{kind} {LIST_START}{separator.join(parts)}">{label}</point>'
