"""From a row as someone wrote it to an example that a preprocessor takes.

Four families of rows are recognised by their fields: chat records (`messages`; content is text or OpenAI-style parts), LLaVA
conversations (`conversations`), task records (`style`, `message_list`, `question`/`answer`, ...: what the preprocessor itself takes) and
PixMo rows (`image_url` with captions, transcripts, points, counts or a question). docs/data.md shows each.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.data.sources import Record, Rejected

MAX_ANNOTATIONS = 1000
"""A record with more annotations is rejected: it is a mistake in whatever wrote it."""

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant", "system": "system"}
_TASK_FIELDS = (
    "style", "question", "answer", "answers", "answer_annotations", "options", "answer_idx", "points", "label", "text", "count",
    "message_list", "point_scale", "explanation", "unlabelled_options", "weight", "subtitle", "clip_start", "clip_end", "sampler_overrides",
)  # fmt: skip


def normalise(record: Record) -> dict[str, Any]:
    """The example of a record, media still as references (absolute paths, URLs or bytes).

    Returns:
        `image`, `images` or `video` (or none of them), `messages` or the fields of a task, and `metadata`.

    Raises:
        Rejected: what field is wrong, in words for the report.
    """
    data = record.data
    example: dict[str, Any] = {}
    media: list[Any] = []
    if "messages" in data:
        example["messages"] = _chat(data["messages"], media)
    elif "conversations" in data:
        example["messages"] = _llava(data["conversations"])
    elif "image_url" in data and "message_list" not in data:
        example |= pixmo(data)
    elif "caption" in data and not any(field in data for field in ("question", "message_list", "text")):
        example |= {"style": data.get("style", "long_caption"), "text": _text(data["caption"], "caption")}
    for field in _TASK_FIELDS:
        if field in data and field not in example:
            example[field] = data[field]
    example |= _media(data, media, record)
    if "message_list" in example:
        _check_tree(example["message_list"])
    elif "messages" not in example and "style" not in example:
        if "question" not in example:
            raise Rejected("record: no text", f"none of messages, conversations, question, caption, message_list; fields: {sorted(data)}")
        example["style"] = "demo"
    example["metadata"] = dict(data.get("metadata") or {})
    if "id" in data:
        example["metadata"].setdefault("id", data["id"])
    return example


def _chat(messages: Any, media: list[Any]) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise Rejected("record: no messages", "messages is empty or no list")
    result = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, str):
            result.append({"role": ("user", "assistant")[i % 2], "content": message})
            continue
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise Rejected("record: bad message", f"{where}: needs role and content")
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join(filter(None, (_part(part, f"{where}.content[{k}]", media) for k, part in enumerate(content))))
        result.append({"role": _role(message["role"], where), "content": _text(content, f"{where}.content")})
    return _alternating(result)


def _part(part: Any, where: str, media: list[Any]) -> str:
    """The text of a content part; a medium is appended to `media` as (kind, reference)."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part.get("text"), f"{where}.text")
    for medium in ("image", "video"):
        if kind in (medium, f"{medium}_url"):
            value = part.get(kind, part.get(medium, part.get("url")))
            value = value.get("url") if isinstance(value, dict) and "url" in value else value
            media.append((medium, value))  # None: a placeholder of the record's own image field
            return ""
    raise Rejected("record: bad message", f"{where}: type {kind!r} is none of text, image, image_url, video, video_url")


def _llava(conversations: Any) -> list[dict[str, str]]:
    if not isinstance(conversations, list) or not conversations:
        raise Rejected("record: no messages", "conversations is empty or no list")
    result = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise Rejected("record: bad message", f"conversations[{i}]: needs from and value")
        text = _text(turn["value"], f"conversations[{i}].value").replace("<image>", "").replace("<video>", "").strip()
        result.append({"role": _role(turn["from"], f"conversations[{i}]"), "content": text})
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


def pixmo(data: dict[str, Any]) -> dict[str, Any]:
    """The task of a PixMo row: captions and transcripts, points, counts, or a question."""
    label = data.get("label")
    if "caption" in data or "transcripts" in data:
        texts = [("long_caption", data["caption"])] if data.get("caption") else []
        texts += [("transcript", t) for t in data.get("transcripts") or ()]
        return {"message_list": [{"style": style, "text": _text(t, style)} for style, t in texts]}
    if "points" in data and label is not None and "question" not in data:
        try:
            points = [[float(p["x"]), float(p["y"])] for p in data["points"] or ()]
        except (TypeError, KeyError, ValueError) as error:
            raise Rejected("record: bad points", f"points: objects with x and y in percent are needed ({error!r})") from None
        style = "point_count" if data.get("collection_method") == "counting" or "count" in data else "pointing"
        return {"style": style, "label": _text(label, "label"), "points": points, "point_scale": 100}
    if "count" in data and label is not None:
        return {"style": "demo", "question": f"How many {_text(label, 'label')} are there?", "answer": str(data["count"])}
    if "question" in data:
        answer = data.get("answer", data.get("response", data.get("parsed_response")))
        return {"style": data.get("style", "demo"), "question": _text(data["question"], "question"), "answer": _text(answer, "answer")}
    raise Rejected("record: no text", f"a PixMo row of an unknown kind; fields: {sorted(data)}")


def _media(data: dict[str, Any], parts: list[Any], record: Record) -> dict[str, Any]:
    """`image`, `images` or `video`, wherever the record says so."""
    found = {field: data[field] for field in ("image", "images", "video") if data.get(field) is not None}
    if not found and data.get("image_url"):
        found = {"image": data["image_url"]}
    inline = [(kind, value) for kind, value in parts if value is not None]
    if inline and not found:
        kinds = {kind for kind, _ in inline}
        if kinds == {"video", "image"} or (kinds == {"video"} and len(inline) > 1):
            raise Rejected("record: too many media", "one video, or images, in a record")
        found = {"video": inline[0][1]} if kinds == {"video"} else {"images": [value for _, value in inline]}
    if len(found) > 1:
        raise Rejected("record: too many media", f"one of {', '.join(found)}, please")
    if isinstance(found.get("image"), list):
        found = {"images": found["image"]}
    if isinstance(found.get("video"), dict):
        raise_if_not = {k: v for k, v in found["video"].items() if k in ("path", "bytes", "url")}
        clip = {f"clip_{k}": found["video"][k] for k in ("start", "end") if k in found["video"]}
        found = {"video": raise_if_not, **clip}
    resolve = resolver(record.source)
    for field, value in found.items():
        if field == "images":
            if not isinstance(value, list) or not value:
                raise Rejected("record: bad field", "images: a list with at least one image")
            found[field] = [resolve(v, f"images[{i}]") for i, v in enumerate(value)]
        elif field in ("image", "video"):
            found[field] = resolve(value, field)
    if len(found.get("images", ())) == 1:
        found = {"image": found["images"][0]}
    for field, name in (("start", "clip_start"), ("end", "clip_end")):
        if "video" in found and data.get(field) is not None:
            found.setdefault(name, data[field])
    if "video" in found and data.get("subtitles"):
        found["subtitle"] = data["subtitles"]
    return found


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
            raise Rejected("record: bad field", f"{field}: a path, a URL or bytes is needed, found {type(value).__name__}")
        if "://" in value or value.startswith("data:"):
            return value
        return posixpath.join(base, value) if remote else str(Path(base, value))

    return resolve


def _check_tree(items: Any) -> None:
    if not isinstance(items, list) or not items:
        raise Rejected("record: no annotations", "message_list is empty or no list")
    if len(items) > MAX_ANNOTATIONS:
        raise Rejected("record: too many annotations", f"{len(items):,} in message_list, at most {MAX_ANNOTATIONS:,}")
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise Rejected("record: bad field", f"message_list[{i}]: an object is needed, found {type(item).__name__}")


def _role(value: Any, where: str) -> str:
    if value not in _ROLES:
        raise Rejected("record: bad message", f"{where}: role {value!r} is none of {', '.join(_ROLES)}")
    return _ROLES[value]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Rejected(
            "record: bad field", f"{field}: text is needed, found {'an empty one' if isinstance(value, str) else type(value).__name__}"
        )
    return value
