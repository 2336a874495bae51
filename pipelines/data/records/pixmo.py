"""PixMo rows as they are published: `image_url` with captions and transcripts, points, counts, or a question."""

from __future__ import annotations

import math
import re
import reprlib
from typing import Any

from pipelines.data.records.fields import text
from pipelines.data.rejects import Rejected

_QUESTION_FIELDS = ("answers", "options", "unlabelled_options", "option_names", "answer_idx", "explanation")
_MARKER = re.compile(r"\[(USER|ASSISTANT)\]")


def pixmo(data: dict[str, Any]) -> dict[str, Any]:
    """The task of a PixMo row without nulls.

    Raises:
        Rejected: what field is wrong, or a row of an unknown kind.
    """
    if "caption" in data or "transcripts" in data:
        return {"message_list": _captions(data)}
    if "question" in data:
        return _question(data)
    if "label" in data and ("points" in data or "count" in data):
        label = text(data["label"], "label")
        count = _count(data["count"]) if "count" in data else None
        if "points" not in data:
            return {"style": data.get("style", "demo"), "question": f"How many {label} are there?", "answer": str(count)}
        task = _points(data["points"])
        if count is not None and count != len(task["points"]):
            raise Rejected("record: bad points", f"count is {count}, but there are {len(task['points'])} points")
        style = "point_count" if count is not None or data.get("collection_method") == "counting" else "pointing"
        return {"style": data.get("style", style), "label": label, **task}
    raise Rejected("record: no text", f"a PixMo row of an unknown kind; fields: {sorted(data)}")


def _captions(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The caption, and the transcripts, of which one is drawn each time the record is used."""
    transcripts = data.get("transcripts", [])
    if not isinstance(transcripts, list):
        raise Rejected("record: bad field", f"transcripts: a list of texts is needed, found {reprlib.repr(transcripts)}")
    texts = [text(t, f"transcripts[{i}]") for i, t in enumerate(transcripts)]
    captions = [{"style": "long_caption", "text": text(data["caption"], "caption")}] if "caption" in data else []
    return captions + ([{"style": "transcript", "text": texts if len(texts) > 1 else texts[0]}] if texts else [])


def _points(value: Any) -> dict[str, Any]:
    """`points`, and `point_scale` unless they are pixels: PixMo-Points gives objects in percent, PixMo-Count columns in pixels."""
    try:
        columns = isinstance(value, dict)
        pairs = list(zip(value["x"], value["y"], strict=True)) if columns else [(p["x"], p["y"]) for p in value]
        points = [[float(x), float(y)] for x, y in pairs]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise Rejected(
            "record: bad points", f"points: [{{x, y}}, ...] in percent or {{x: [...], y: [...]}} in pixels is needed ({error!r})"
        ) from None
    if not all(map(math.isfinite, (v for point in points for v in point))):
        raise Rejected("record: bad points", "points: NaN or Infinity among them")
    return {"points": points} if columns else {"points": points, "point_scale": 100}


def _count(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.0+)?", str(value)):
        raise Rejected("record: bad field", f"count: a whole number is needed, found {reprlib.repr(value)}")
    return int(float(value))


def _question(data: dict[str, Any]) -> dict[str, Any]:
    """Ask-Model-Anything, Cap-QA, whose question may hold the turns before the answer, and whatever else asks about a picture."""
    if {"points", "inline_text", "alt_text"} & data.keys() or "<|POINT|>" in str(data.get("parsed_response")):
        raise Rejected(
            "record: not supported",
            "an answer that points (point explanations): write message_list with answer, <|POINT|> for each tag, and answer_annotations",
        )
    question, style = text(data["question"], "question"), data.get("style", "demo")
    answer = next((data[field] for field in ("answer", "response", "parsed_response") if field in data), None)
    if answer is None and not {"answers", "answer_idx"} & data.keys():
        raise Rejected("record: no answer", f"none of answer, answers, answer_idx, response; fields: {sorted(data)}")
    rest = {field: data[field] for field in _QUESTION_FIELDS if field in data} | ({} if answer is None else {"answer": answer})
    if not question.lstrip().startswith("[USER]"):
        return {"style": style, "question": question, **rest}
    _, *found = _MARKER.split(question)
    if not found[-1].strip() and found[-2] == "ASSISTANT":  # the answer follows
        found = found[:-2]
    roles, turns = [role.lower() for role in found[::2]], [turn.strip() for turn in found[1::2]]
    if not all(turns) or roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or roles[-1] != "user":
        raise Rejected("record: bad message", "question: [USER] and [ASSISTANT] take turns, with text after each and an answer to the last")
    if len(turns) == 1:
        return {"style": style, "question": turns[0], **rest}
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    return {"style": style, "messages": [*messages, {"role": "assistant", "content": text(answer, "answer")}]}
