"""Points as text, and back.

`v1` (Molmo): percent of width and height with one decimal, `<point x="61.5" y="40.6" alt="L">L</point>` or
`<points x1=".." y1=".." x2=".." y2=".." alt="L">L</points>`.

`html-v1` / `html-v2` (Molmo2): integers 0-1000 with at least three digits, `<points coords="1 1 123 456 2 789 012">L</points>`:
a block is the image number (or the time in seconds) and then a running point id with x and y for each point. Blocks are separated by
a tab (`html-v1`) or a semicolon (`html-v2`). Tracks repeat an object's id: `<tracks coords="t id x y id x y;t ...">L</tracks>`.

Sources: published Molmo and Molmo2 code.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

NONE_TEXT = "There are none."
NO_TRACKS_TEXT = "No tracks available."
HTML_SCALE = 1000
CLAMPED_PERCENT = 5.0
"""Points this far outside the image are moved to its border."""
_SEPARATOR = {"html-v1": "\t", "html-v2": ";"}

PointMode = Literal["point", "point_then_count", "count_then_point", "count"]


@dataclasses.dataclass(frozen=True)
class Point:
    """A point read from a text.

    Attributes:
        x, y: pixels.
        block: image number (from 1) or time in seconds; None where the format has none.
        id: running number of the point, or number of the tracked object; None where the format has none.
    """

    x: float
    y: float
    block: float | None = None
    id: int | None = None


def percent(points: Iterable[Sequence[float]], scale: float | None, image_size: tuple[int, int] | None) -> np.ndarray:
    """Points on the 0-100 scale.

    Args:
        points: (x, y) pairs.
        scale: the largest coordinate of both axes (100: percent, 1: shares); None = pixels.
        image_size: width, height in pixels; needed for pixels only.

    Returns:
        float64 [n, 2].

    Raises:
        ValueError: not pairs, pixels without an image, or points further outside the image than a slip of the annotator.
    """
    array = np.asarray(list(points), np.float64)
    if array.size == 0:
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"points are (x, y) pairs, got an array of shape {array.shape}")
    if scale is None:
        if image_size is None:
            raise ValueError("points in pixels need an image; give point_scale (for example 100 for percent) for records without one")
        array = array * 100.0 / np.asarray(image_size, np.float64)
    elif scale != 100:
        array = array * (100.0 / scale)
    beyond = np.maximum(-array, array - 100)
    if not np.isfinite(array).all() or beyond.max() > CLAMPED_PERCENT:
        x, y = array[int(np.nan_to_num(beyond, nan=np.inf).max(axis=1).argmax())]
        raise ValueError(f"point outside the image: ({x:.1f} %, {y:.1f} %) of width and height; check point_scale={scale!r}")
    return array.clip(0, 100)


def shares(points: Iterable[Sequence[float]], scale: float | None, image_size: tuple[int, int] | None) -> np.ndarray:
    """Points on the 0-1 scale, as exact as they were given; the arguments and errors of `percent`."""
    points = list(points)
    if len(percent(points, scale, image_size)) == 0:
        return np.zeros((0, 2))
    return (np.asarray(points, np.float64) / np.asarray(image_size if scale is None else scale, np.float64)).clip(0, 1)


def format_v1(points: np.ndarray, label: str, alt: str | None = None) -> str:
    """The v1 tag of points on the 0-100 scale, [n, 2]; sorted by x, then y. No points give `NONE_TEXT`."""
    if len(points) == 0:
        return NONE_TEXT
    alt = label if alt is None else alt
    rounded = sorted(((round(float(x), 1), round(float(y), 1)) for x, y in points), key=lambda p: p[0] * 10000 + p[1])
    if len(rounded) == 1:
        x, y = rounded[0]
        return f'<point x="{x}" y="{y}" alt="{alt}">{label}</point>'
    pairs = " ".join(f'x{i}="{x}" y{i}="{y}"' for i, (x, y) in enumerate(rounded, 1))
    return f'<points {pairs} alt="{alt}">{label}</points>'


def format_html(
    blocks: Sequence[tuple[float, np.ndarray]], label: str, version: Literal["html-v1", "html-v2"], alt: str | None = None
) -> str:
    """The Molmo2 tag.

    Args:
        blocks: (image number or seconds, points on the 0-100 scale [n, 2]); whole numbers (`int`) are written as such.
        label: text of the tag.
        version: which separator.
        alt: optional alternative text.
    """
    texts, number = [], 1
    for key, points in blocks:
        if len(points) == 0:
            continue
        fields = [_block_key(key)]
        for x, y in sorted(_thousandths(x, y) for x, y in points):
            fields.append(f"{number} {x:03d} {y:03d}")
            number += 1
        texts.append(" ".join(fields))
    return _tag("points", texts, label, version, alt) if texts else NONE_TEXT


def format_tracks(
    frames: Sequence[tuple[float, Mapping[Any, Sequence[float] | np.ndarray | None]]],
    label: str,
    version: Literal["html-v1", "html-v2"],
    alt: str | None = None,
) -> str:
    """The tracks tag.

    Args:
        frames: (seconds, {object: (x, y) on the 0-100 scale, or None while it is hidden}).

    Objects are renumbered from 1 by their first appearance (by position within a frame).
    """
    numbers: dict[Any, int] = {}
    texts = []
    for seconds, objects in frames:
        seen = {name: _thousandths(*xy) for name, xy in objects.items() if xy is not None}
        for name in sorted((n for n in seen if n not in numbers), key=lambda n: seen[n]):
            numbers[name] = len(numbers) + 1
        if seen:
            triples = sorted((numbers[name], *xy) for name, xy in seen.items())
            texts.append(" ".join([_block_key(float(seconds)), *(f"{i} {x:03d} {y:03d}" for i, x, y in triples)]))
    return _tag("tracks", texts, label, version, alt) if texts else NO_TRACKS_TEXT


def answer_text(tag: str, count: int, mode: PointMode) -> str:
    """The sentence around a tag: pointing, counting by pointing, or the bare count."""
    if mode == "count":
        return str(count)
    if count == 0 or mode == "point":
        return tag
    if mode == "point_then_count":
        return f"Counting the {tag} shows a total of {count}."
    return f"There are {count} {tag}."


def _thousandths(x: float, y: float) -> tuple[int, int]:
    return round(x * HTML_SCALE / 100), round(y * HTML_SCALE / 100)


def _block_key(key: float) -> str:
    return str(key) if isinstance(key, int) else f"{key:.1f}"


def _tag(kind: str, blocks: Sequence[str], label: str, version: str, alt: str | None) -> str:
    alt_text = "" if alt is None else f' alt="{alt}"'
    return f'<{kind}{alt_text} coords="{_SEPARATOR[version].join(blocks)}">{label}</{kind}>'


# Numbers and blanks are bounded and a tag ends where the next begins, so that no text takes long and no number is too long to read.
_HTML_TAG = re.compile(r'<(?:points|tracks)\b(?:(?!<points|<tracks)[^>])*?\bcoords="([0-9\t;:,. ]+)"?')
_HTML_BLOCK = re.compile(r"(?:^|[\t;:,]) *(\d{1,9}(?:\.\d{1,9})?)((?: {1,4}\d{1,9} {1,4}\d{3,4} {1,4}\d{3,4}\b)+)")
_HTML_TRIPLE = re.compile(r"(\d{1,9}) {1,4}(\d{3,4}) {1,4}(\d{3,4})\b")
_V1_TAG = re.compile(r"<points?\b([^>]*)>?")
_V1_PAIR = re.compile(
    r'\bx(\d{0,9})\s{0,4}=\s{0,4}"?\s{0,4}([0-9]{1,9}(?:\.[0-9]{1,18})?)"?\s{1,4}y\1\s{0,4}=\s{0,4}"?\s{0,4}([0-9]{1,9}(?:\.[0-9]{1,18})?)'
)
_OPEN = re.compile(r'<(points?|tracks)\b(?:[^<>"]|"[^"]*")*>')
_CLOSE = re.compile(r"</(points?|tracks)>")
_ALT = re.compile(r'\balt="([^"]*)"')
_PAIR = re.compile(r"\(\s{0,4}([0-9]{1,9}(?:\.[0-9]{1,18})?)\s{0,4},\s{0,4}([0-9]{1,9}(?:\.[0-9]{1,18})?)\s{0,4}\)")
_P_TRIPLE = re.compile(r"\bp\s{0,4}=\s{0,4}([0-9]{3})\s{0,4},\s{0,4}([0-9]{3})\b")


class Tag(NamedTuple):
    """A complete tag of points or tracks."""

    label: str | None
    """The text between its marks, or else its `alt`; None: there is neither."""
    points: list[Point]
    """x and y are shares of the image."""
    end: int
    """Where the text goes on."""
    start: int = 0
    """Where its opening mark begins; meaningless without points."""
    kind: str = "points"
    """Name of the mark."""
    outside: int = 0
    """Points that it names outside the image."""


def complete_tags(text: str) -> Iterator[Tag]:
    """The tags of a text that are closed, in order; one without points if what is closed was not opened rightly."""
    start = 0
    for close in _CLOSE.finditer(text):
        opening = _OPEN.match(text, max(text.rfind("<point", start, close.start()), text.rfind("<tracks", start, close.start()), start))
        start = close.end()
        if opening is None or opening[1] != close[1] or opening.end() > close.start():
            yield Tag(None, [], close.end())
            continue
        alt = _ALT.search(opening[0])
        label = text[opening.end() : close.start()] or (alt[1] if alt else "")
        found = _shares(opening[0])
        points = _inside(found, 1, 1)
        yield Tag(label or None, points, close.end(), opening.start(), opening[1], len(found) - len(points))


def extract_points(text: str, width: int, height: int) -> list[Point]:
    """Every point of a text, in pixels of an image of `width` x `height`.

    Reads both formats above and the older ones: `(x, y)` pairs and `p=ddd,ddd` in percent and tenths of percent. A tag that was cut off
    gives the points before the cut. Points outside the image are left out.
    """
    return _inside(_shares(text), width, height)


def _shares(text: str) -> list[Point]:
    """The points that a text names, x and y as shares of the image."""
    found: list[tuple[float, float, float | None, int | None]] = []
    for coords in _HTML_TAG.findall(text):
        for key, triples in _HTML_BLOCK.findall(coords):
            for number, x, y in _HTML_TRIPLE.findall(triples):
                found.append((int(x) / HTML_SCALE, int(y) / HTML_SCALE, float(key), int(number)))
    if not found:
        for attributes in _V1_TAG.findall(text):
            for number, x, y in _V1_PAIR.findall(attributes):
                found.append((float(x) / 100, float(y) / 100, None, int(number) if number else None))
    if not found:
        found = [(float(x) / 100, float(y) / 100, None, None) for x, y in _PAIR.findall(text)]
    if not found:
        found = [(int(x) / 1000, int(y) / 1000, None, None) for x, y in _P_TRIPLE.findall(text)]
    return [Point(*fields) for fields in found]


def _inside(points: Iterable[Point], width: int, height: int) -> list[Point]:
    return [dataclasses.replace(p, x=p.x * width, y=p.y * height) for p in points if 0 <= p.x <= 1 and 0 <= p.y <= 1]
