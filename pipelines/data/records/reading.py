"""From a row as someone wrote it to an example that a preprocessor takes.

Four families of rows are recognised by their fields: chat records (`messages`; content is text or OpenAI-style parts), LLaVA
conversations (`conversations`), task records (`style`, `message_list`, `question`/`answer`, ...: what the preprocessor itself takes) and
PixMo rows (`image_url` with captions, transcripts, points, counts or a question). docs/data.md shows each.
"""

from __future__ import annotations

import dataclasses
import math
import posixpath
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molmo_core.preprocessing.task_fields import check_task
from pipelines.data.records.fields import check_unicode, text
from pipelines.data.records.pixmo import pixmo
from pipelines.data.records.record import Record
from pipelines.data.rejects import Rejected

MAX_ANNOTATIONS = 1000
"""A record with more annotations is rejected: it is a mistake in whatever wrote it."""

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant", "system": "system"}
_COMMON_FIELDS = ("style", "weight", "message_weight")
_TASK_FIELDS = (
    *_COMMON_FIELDS, "question", "answer", "answers", "answer_annotations", "options", "unlabelled_options", "option_names", "answer_idx",
    "points", "point_scale", "image_points", "timestamps", "tracks", "label", "text", "count", "message_list", "explanation",
)  # fmt: skip
_ANSWERS = frozenset({"messages", "answer", "answers", "answer_idx", "text", "points", "image_points", "tracks", "count"})
_MEDIA = ("image", "images", "video")
_LONGEST_S = 1e9
_UNREAD = ("img", "imgs", "image_path", "image_paths", "image_file", "video_path", "video_url")
_UNREAD_SOUND = ("audio", "audios")


@dataclasses.dataclass
class _Inline:
    """What messages say about media: the references in their parts, and how many places they have for media."""

    media: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    parts: Counter[str] = dataclasses.field(default_factory=Counter)
    marks: Counter[str] = dataclasses.field(default_factory=Counter)
    """`<image>` and `<video>` in texts."""

    def without_marks(self, words: str) -> str:
        found = Counter({kind: words.count(f"<{kind}>") for kind in ("image", "video")})
        self.marks += found
        return words.replace("<image>", "").replace("<video>", "").strip() if found.total() else words


def read_record(record: Record) -> dict[str, Any]:
    """The example of a record, media still as references (absolute paths, URLs or bytes).

    Returns:
        `image`, `images` or `video` (or none of them), `messages` or the fields of a task, and `metadata`.

    Raises:
        Rejected: what field is wrong, in words for the report. Nothing else: no row stops a run.
    """
    try:
        return _example({k: v for k, v in record.data.items() if v is not None}, record.source)
    except Rejected:
        raise
    except Exception as error:  # a case not thought of; counted and reported with its type, as in `ExampleBuilder.build`
        raise Rejected("record: cannot be read", f"{type(error).__name__}: {error}") from error


def _example(data: dict[str, Any], source: str) -> dict[str, Any]:
    example: dict[str, Any] = {}
    inline = _Inline()
    fields: tuple[str, ...] = _TASK_FIELDS
    if "messages" in data:
        example["messages"] = _chat(data["messages"], inline)
    elif "conversations" in data:
        example["messages"] = _llava(data["conversations"], inline)
    elif "image_url" in data and not {"message_list", "text"} & data.keys():
        example, fields = pixmo(data), _COMMON_FIELDS
    elif "caption" in data and not {"question", "message_list", "text"} & data.keys():
        example, fields = {"style": data.get("style", "long_caption"), "text": text(data["caption"], "caption")}, _COMMON_FIELDS
    for field in fields:
        if field in data:
            example.setdefault(field, data[field])
    example |= _media(data, inline, resolver(source))
    if "message_list" in example:
        example["message_list"] = _tree(example["message_list"])
    elif "messages" not in example and "style" not in example:
        pointing = "label" in example and {"points", "image_points"} & example.keys()
        if "question" not in example and not pointing:
            raise Rejected("record: no text", f"none of messages, conversations, question, caption, message_list; fields: {sorted(data)}")
        example["style"] = "demo" if "question" in example else "pointing"
    metadata = data.get("metadata", {})
    if not isinstance(metadata, dict):
        raise Rejected("record: bad field", f"metadata: an object is needed, found {reprlib.repr(metadata)}")
    if "id" in data:
        _check_texts(data["id"], "id")
        metadata = {"id": data["id"], **metadata}
    example = _task(example)
    example["metadata"] = metadata
    for field, value in example.items():
        _check_texts(value, field)
    return example


def _chat(messages: Any, inline: _Inline) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise Rejected("record: no messages", "messages is empty or no list")
    result = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, str):
            message = {"role": ("user", "assistant")[i % 2], "content": message}
            field = where
        elif not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise Rejected("record: bad message", f"{where}: needs role and content")
        else:
            field = f"{where}.content"
        role, content = _role(message["role"], where), message["content"]
        if isinstance(content, list):
            content = "\n".join(filter(None, (_part(part, f"{field}[{k}]", inline) for k, part in enumerate(content))))
        content = text(content, field)
        result.append({"role": role, "content": content if role == "assistant" else inline.without_marks(content)})
    return _alternating(result)


def _part(part: Any, where: str, inline: _Inline) -> str:
    """The text of a content part, or none: a medium is noted."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return text(part.get("text"), f"{where}.text")
    for medium in ("image", "video"):
        if kind in (medium, f"{medium}_url"):
            reference = next((part[key] for key in (kind, medium, f"{medium}_url", "url", "path") if part.get(key) is not None), None)
            inline.parts[medium] += 1
            if reference is not None:  # else a place for the record's own
                inline.media.append((medium, reference))
            return ""
    raise Rejected("record: bad message", f"{where}: type {kind!r} is none of text, image, image_url, video, video_url")


def _llava(conversations: Any, inline: _Inline) -> list[dict[str, str]]:
    if not isinstance(conversations, list) or not conversations:
        raise Rejected("record: no messages", "conversations is empty or no list")
    result = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise Rejected("record: bad message", f"conversations[{i}]: needs from and value")
        role, words = _role(turn["from"], f"conversations[{i}]"), text(turn["value"], f"conversations[{i}].value").strip()
        result.append({"role": role, "content": words if role == "assistant" else inline.without_marks(words)})
    return _alternating(result)


def _alternating(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """User and assistant in turn; a system message joins the first question."""
    if messages[0]["role"] == "system":
        if len(messages) < 2:
            raise Rejected("record: bad message", "only a system message")
        first = {"role": messages[1]["role"], "content": f"{messages[0]['content']}\n{messages[1]['content']}"}
        messages = [first, *messages[2:]]
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise Rejected("record: bad message", f"turn {i} is of {message['role']}; user and assistant take turns, the user begins")
    if len(messages) < 2:
        raise Rejected("record: no answer", "the assistant says nothing")
    return messages


def _media(data: dict[str, Any], inline: _Inline, resolve: Callable[[Any, str], str | bytes]) -> dict[str, Any]:
    """`image`, `images` or `video` with its clip and subtitles, wherever the record says so."""
    found = {field: data[field] for field in _MEDIA if field in data}
    if data.get("videos"):
        if not isinstance(data["videos"], list) or len(data["videos"]) > 1:
            raise Rejected("record: too many media", f"videos: a list of one video is needed, found {reprlib.repr(data['videos'])}")
        found.setdefault("videos", data["videos"][0])
    if not found and data.get("image_url"):
        found = {"image_url": data["image_url"]}
    for key in (*_UNREAD_SOUND, *(() if found else _UNREAD)):
        if data.get(key):
            raise Rejected("record: bad field", f"{key}: not read; media are image, images, image_url, video or parts of messages")
    if inline.media:
        kinds = {kind for kind, _ in inline.media}
        if found:
            where = f"{' and '.join(sorted(kinds))} in messages, but also {', '.join(found)} beside them"
            raise Rejected("record: media do not match", where)
        if kinds == {"video", "image"} or (kinds == {"video"} and len(inline.media) > 1):
            raise Rejected("record: too many media", "one video, or images, in a record")
        found = {"video": inline.media[0][1]} if kinds == {"video"} else {"images": [value for _, value in inline.media]}
    if len(found) > 1:
        raise Rejected("record: too many media", f"one of {', '.join(found)}, please")
    name, value = next(iter(found.items()), ("", None))
    if name in ("video", "videos"):
        _check_places(inline, videos=1)
        clip = _clip(data, value if isinstance(value, dict) else {})
        return {"video": resolve(value, name), **clip, **_subtitles(data, clip)}
    if data.get("subtitles") or data.get("subtitle"):
        raise Rejected("record: bad field", "subtitles: there is no video that they belong to")
    if not found:
        _check_places(inline)
        return {}
    several = value if name == "images" or isinstance(value, list) else [value]
    if not isinstance(several, list) or not several:
        raise Rejected("record: bad field", f"{name}: a list with at least one image")
    _check_places(inline, images=len(several))
    references = [resolve(v, name if several is not value else f"{name}[{i}]") for i, v in enumerate(several)]
    return {"image": references[0]} if len(references) == 1 else {"images": references}


def _check_places(inline: _Inline, images: int = 0, videos: int = 0) -> None:
    """Messages have no places for media, or as many as there are media. In front of a video LLaVA's `<image>` means the video."""
    for places in (inline.marks, inline.parts):
        if videos and places.total() in (0, videos):
            continue
        for kind, there in (("image", images), ("video", videos)):
            if places[kind] and places[kind] != there:
                raise Rejected(
                    "record: media do not match",
                    f"{places[kind]} <{kind}> placeholder{'s'[: places[kind] > 1]}, {there} {kind}{'s'[: there != 1]}",
                )


def _clip(data: dict[str, Any], video: dict[str, Any]) -> dict[str, Any]:
    """`clip_start` and `clip_end`, if only a part of the video is meant."""
    clip = {}
    for edge in ("start", "end"):
        given = (("video." + edge, video.get(edge)), (edge, data.get(edge)), ("clip_" + edge, data.get("clip_" + edge)))
        field, value = next(((field, value) for field, value in given if value is not None), ("", None))
        if value is not None:
            clip["clip_" + edge] = _seconds(value, field)
    if "clip_end" in clip and clip["clip_end"] <= clip.get("clip_start", 0):
        raise Rejected("record: bad field", f"end: {clip['clip_end']} s is not after the start, {clip.get('clip_start', 0)} s")
    return clip


def _subtitles(data: dict[str, Any], clip: dict[str, Any]) -> dict[str, Any]:
    """`subtitle`: the lines shown during the clip, times from its start (the record's are from the start of the film)."""
    field = "subtitles" if data.get("subtitles") else "subtitle"
    lines = data.get(field, [])
    if not isinstance(lines, list):
        raise Rejected("record: bad field", f"{field}: a list of {{start, end, text}} is needed, found {reprlib.repr(lines)}")
    first, last = clip.get("clip_start", 0), clip.get("clip_end", math.inf)
    shown = []
    for i, line in enumerate(lines):
        where = f"{field}[{i}]"
        if not isinstance(line, dict):
            raise Rejected("record: bad field", f"{where}: {{start, end, text}} is needed, found {reprlib.repr(line)}")
        start, end = (_seconds(line.get(edge), f"{where}.{edge}") for edge in ("start", "end"))
        words = text(line.get("text"), f"{where}.text")
        if start < last and (end > first or start >= first):
            shown.append({"start": round(max(start, first) - first, 3), "end": round(min(end, last) - first, 3), "text": words})
    return {"subtitle": shown} if shown else {}


def resolver(source: str) -> Callable[[Any, str], str | bytes]:
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
        return posixpath.join(base, value) if remote else str(Path(base, value))

    return resolve


def _tree(items: Any) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not items:
        raise Rejected("record: no annotations", "message_list is empty or no list")
    if len(items) > MAX_ANNOTATIONS:
        raise Rejected("record: too many annotations", f"{len(items):,} in message_list, at most {MAX_ANNOTATIONS:,}")
    result = []
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise Rejected("record: bad field", f"message_list[{i}]: an object is needed, found {type(item).__name__}")
        result.append(_task(item, f"message_list[{i}]."))
        if not _ANSWERS & result[-1].keys():
            raise Rejected("record: no answer", f"message_list[{i}]: none of {', '.join(sorted(_ANSWERS))}; fields: {sorted(item)}")
    return result


def _task(task: dict[str, Any], where: str = "") -> dict[str, Any]:
    """A checked task: without nulls, the number of an option whole."""
    task = {field: value for field, value in task.items() if value is not None}
    try:
        check_task(task, where)
    except ValueError as error:
        raise Rejected("record: bad field", str(error)) from None
    return task | {"answer_idx": int(task["answer_idx"])} if "answer_idx" in task else task


def _role(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in _ROLES:
        raise Rejected("record: bad message", f"{where}: role {value!r} is none of {', '.join(_ROLES)}")
    return _ROLES[value]


def _seconds(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LONGEST_S:
        raise Rejected("record: bad field", f"{field}: a number of seconds is needed, found {reprlib.repr(value)}")
    return value


def _check_texts(value: Any, field: str) -> None:
    """Every text in a value is valid Unicode."""
    if isinstance(value, str):
        check_unicode(value, field)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key, f"{field}: key")
            _check_texts(item, f"{field}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, str | dict | list):
                _check_texts(item, f"{field}[{i}]")
