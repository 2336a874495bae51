"""The media of a row: in its fields, in the parts of its messages, or in a field of any name. They stay references here."""

from __future__ import annotations

import dataclasses
import math
import posixpath
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.data.records import unread
from pipelines.data.records.content import Medium, is_base64
from pipelines.data.records.fields import Fields, seconds, text
from pipelines.data.rejects import Rejected

_FIELDS = ("image", "images", "video")
_REFERENCE = ("bytes", "path", "url")
Resolver = Callable[[Any, str], str | bytes]


@dataclasses.dataclass
class Inline:
    """What messages say about media: the references in their parts, and how many places they have for media."""

    media: list[tuple[Medium, Any]] = dataclasses.field(default_factory=list)
    parts: Counter[str] = dataclasses.field(default_factory=Counter)
    marks: Counter[str] = dataclasses.field(default_factory=Counter)
    """`<image>` and `<video>` in texts."""

    def without_marks(self, words: str) -> str:
        if "<" not in words:
            return words
        found = Counter({kind: words.count(f"<{kind}>") for kind in ("image", "video")})
        self.marks += found
        return words.replace("<image>", "").replace("<video>", "").strip() if found.total() else words


def read_media(row: Fields, inline: Inline, resolve: Resolver, counts: Counter[str]) -> dict[str, Any]:
    """`image`, `images` or `video` with its clip and subtitles, wherever the row says so; nothing if it has no media."""
    name, value, kind = _found(row, inline)
    if kind == "video":
        _check_places(inline, videos=1)
        given = Fields(value, f"{name}.") if isinstance(value, dict) else Fields({})
        clip = _clip(row, given)
        reference = given.take_all(*_REFERENCE) if isinstance(value, dict) else value
        unread.judge(given, counts, inside=True)
        return {"video": resolve(reference, name), **clip, **_subtitles(row, clip, counts)}
    for field in ("subtitles", "subtitle", "start", "end", "clip_start", "clip_end"):
        edge = row.left.get(field)
        if edge == 0:
            row.take(field)  # the beginning: as it is
        elif edge:
            raise Rejected("record: bad field", f"{field}: there is no video that it belongs to")
    if kind is None:
        _check_places(inline)
        return {}
    several = value if name == "images" or isinstance(value, list) else [value]
    if not isinstance(several, list) or not several:
        raise Rejected("record: bad field", f"{name}: a list with at least one image")
    _check_places(inline, images=len(several))
    references = []
    for i, reference in enumerate(several):
        where = name if several is not value else f"{name}[{i}]"
        if isinstance(reference, dict):
            part = Fields(reference, f"{where}.")
            reference = part.take_all(*_REFERENCE)
            unread.judge(part, counts, inside=True)
        references.append(resolve(reference, where))
    return {"image": references[0]} if len(references) == 1 else {"images": references}


def kind_and_count(media: dict[str, Any]) -> tuple[Medium | None, int]:
    """The kind of the media that `read_media` gave, and their number."""
    if "video" in media:
        return "video", 1
    return ("image", len(media.get("images", [0]))) if media else (None, 0)


def _found(row: Fields, inline: Inline) -> tuple[str, Any, Medium | None]:
    """Name and value of the field that holds the row's media, and their kind; None if there are none."""
    found = row.take_all(*_FIELDS)
    videos = row.take("videos")
    if videos:
        if not isinstance(videos, list) or len(videos) > 1:
            raise Rejected("record: too many media", f"videos: a list of one video is needed, found {reprlib.repr(videos)}")
        found.setdefault("videos", videos[0])
    if not found and row.left.get("image_url"):
        found = row.take_all("image_url")
    if inline.media:
        kinds = {kind for kind, _ in inline.media}
        if found:
            where = f"{' and '.join(sorted(kinds))} in messages, but also {', '.join(found)} beside them"
            raise Rejected("record: media do not match", where)
        if kinds == {"video", "image"} or (kinds == {"video"} and len(inline.media) > 1):
            raise Rejected("record: too many media", "one video, or images, in a record")
        found = {"video": inline.media[0][1]} if kinds == {"video"} else {"images": [value for _, value in inline.media]}
    if len(found) > 1:
        raise Rejected("record: too many media", f"{', '.join(found)}: give only one of them")
    if not found and row.left and (candidate := unread.find_medium(row)):
        field, kind = candidate
        value = row.take(field)
        return field, (value[0] if isinstance(value, list | tuple) else value), kind
    name, value = next(iter(found.items()), ("", None))
    return name, value, ("video" if name.startswith("video") else "image") if found else None


def _check_places(inline: Inline, images: int = 0, videos: int = 0) -> None:
    """Messages have no places for media, or as many as there are media. In front of a video LLaVA's `<image>` means the video."""
    for places in (inline.marks, inline.parts):
        if not places or (videos and places.total() in (0, videos)):
            continue
        for kind, there in (("image", images), ("video", videos)):
            if places[kind] and places[kind] != there:
                raise Rejected(
                    "record: media do not match",
                    f"{places[kind]} <{kind}> placeholder{'s'[: places[kind] > 1]}, {there} {kind}{'s'[: there != 1]}",
                )


def _clip(row: Fields, video: Fields) -> dict[str, Any]:
    """`clip_start` and `clip_end`, if only a part of the video is meant."""
    clip = {}
    for edge in ("start", "end"):
        given = [(f"video.{name}", video.take(name)) for name in (edge, f"video_{edge}")]
        given += [(name, row.take(name)) for name in (edge, f"clip_{edge}")]
        given = [(field, seconds(value, field)) for field, value in given if value is not None]
        if len({value for _, value in given}) > 1:
            raise Rejected("record: bad field", f"{' and '.join(field for field, _ in given)} differ: give only one of them")
        if given:
            clip["clip_" + edge] = given[0][1]
    if "clip_end" in clip and clip["clip_end"] <= clip.get("clip_start", 0):
        raise Rejected("record: bad field", f"end: {clip['clip_end']} s is not after the start, {clip.get('clip_start', 0)} s")
    return clip


def _subtitles(row: Fields, clip: dict[str, Any], counts: Counter[str]) -> dict[str, Any]:
    """`subtitle`: the lines shown during the clip, times from its start (the record's are from the start of the film)."""
    field = "subtitles" if row.left.get("subtitles") else "subtitle"
    lines = row.take(field, [])
    if not isinstance(lines, list):
        raise Rejected("record: bad field", f"{field}: a list of {{start, end, text}} is needed, found {reprlib.repr(lines)}")
    first, last = clip.get("clip_start", 0), clip.get("clip_end", math.inf)
    shown = []
    for i, line in enumerate(lines):
        where = f"{field}[{i}]"
        if not isinstance(line, dict):
            raise Rejected("record: bad field", f"{where}: {{start, end, text}} is needed, found {reprlib.repr(line)}")
        given = Fields(line, f"{where}.")
        start, end = (seconds(given.take(edge), f"{where}.{edge}") for edge in ("start", "end"))
        words = text(given.take("text"), f"{where}.text")
        unread.judge(given, counts, inside=True)
        if start < last and (end > first or start >= first):
            shown.append({"start": round(max(start, first) - first, 3), "end": round(min(end, last) - first, 3), "text": words})
    return {"subtitle": shown} if shown else {}


def resolver(source: str) -> Resolver:
    """A function that turns a media reference of a record file into bytes, a URL or an absolute path."""
    remote = "://" in source
    base = posixpath.dirname(source) if remote else str(Path(source).resolve().parent)

    def resolve(value: Any, field: str) -> str | bytes:
        if isinstance(value, dict):  # {bytes, path} of Hugging Face, {url} of chat parts
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes | bytearray):
            return bytes(value)
        if not isinstance(value, str) or not value:
            kind = "an empty text" if value == "" else type(value).__name__
            raise Rejected("record: bad field", f"{field}: a path, a URL or bytes is needed, found {kind}")
        if "://" in value or value.startswith("data:"):
            return value
        if is_base64(value):
            return "data:;base64," + "".join(value.split())
        return posixpath.join(base, value) if remote else str(Path(base, value))

    return resolve
