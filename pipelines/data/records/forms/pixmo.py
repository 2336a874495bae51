"""PixMo rows as they are published: an image with captions and transcripts, points, counts, or a question."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from typing import Any

from molmo_core.preprocessing.task_fields import COMMON_FIELDS
from pipelines.data.records.fields import Fields, text, whole_number
from pipelines.data.records.forms import task
from pipelines.data.records.forms.points import read_points
from pipelines.data.records.row_media import Inline
from pipelines.data.rejects import Rejected

_MARKER = re.compile(r"\[(USER|ASSISTANT)\]")
_OTHERS = frozenset({"message_list", "text", "timestamps", "image_points", "tracks"})
_ANSWERS = ("answer", "response", "parsed_response")


def fits(row: Fields) -> bool:
    """Whether a row is of this form."""
    fields = row.left.keys()
    if _OTHERS & fields:
        return False
    pointing = "label" in fields and ("points" in fields or "count" in fields) and "question" not in fields
    return "image_url" in fields or "transcripts" in fields or pointing or ("question" in fields and "response" in fields)


def read(row: Fields, inline: Inline, counts: Counter[str]) -> dict[str, Any]:
    """The task of a PixMo row.

    Raises:
        Rejected: what field is wrong, or a row of an unknown kind.
    """
    if "question" in row:
        return _question(row, inline, counts)
    if "caption" in row or "transcripts" in row:
        return {"message_list": _captions(row), **row.take_all(*COMMON_FIELDS)}
    if "label" in row and ("points" in row or "count" in row):
        return task.checked({**_pointing(row, counts), **row.take_all(*COMMON_FIELDS)})
    raise Rejected("record: no text", f"a PixMo row of an unknown kind; fields: {sorted(row.left)}")


def _pointing(row: Fields, counts: Counter[str]) -> dict[str, Any]:
    label = text(row.take("label"), "label")
    count = whole_number(row.take("count"), "count") if "count" in row else None
    method = row.take("collection_method")
    if "points" not in row:
        return {"style": "demo", "question": f"How many {label} are there?", "answer": str(count)}
    made = read_points(row.take("points"), row, counts)
    if count is not None and count != len(made["points"]):
        raise Rejected("record: bad points", f"count is {count}, but there are {len(made['points'])} points")
    return {"style": "point_count" if count is not None or method == "counting" else "pointing", "label": label, **made}


def _captions(row: Fields) -> list[dict[str, Any]]:
    """The caption, and the transcripts, of which one is drawn each time the record is used."""
    transcripts = row.take("transcripts", [])
    if not isinstance(transcripts, list):
        raise Rejected("record: bad field", f"transcripts: a list of texts is needed, found {reprlib.repr(transcripts)}")
    texts = [text(t, f"transcripts[{i}]") for i, t in enumerate(transcripts)]
    captions = [{"style": "long_caption", "text": text(row.take("caption"), "caption")}] if "caption" in row else []
    return captions + ([{"style": "transcript", "text": texts if len(texts) > 1 else texts[0]}] if texts else [])


def _question(row: Fields, inline: Inline, counts: Counter[str]) -> dict[str, Any]:
    """Ask-Model-Anything, Cap-QA, whose question may hold the turns before the answer, and whatever else asks about a picture."""
    fields = row.left.keys()
    explained = "points" in fields and not fields.isdisjoint(_ANSWERS)
    if explained or {"inline_text", "alt_text"} & fields or "<|POINT|>" in str(row.left.get("parsed_response")):
        raise Rejected(
            "record: not supported",
            "an answer that points (point explanations): write message_list with answer, <|POINT|> for each tag, and answer_annotations",
        )
    question, given = text(row.take("question"), "question"), row.take_all(*_ANSWERS)
    if not given and not {"answers", "answer_idx", "answer_index", "count", "points"} & row.left.keys():
        raise Rejected("record: no answer", f"none of answer, answers, answer_idx, response; fields: {sorted(row.left)}")
    if len(set(map(str, given.values()))) > 1:
        raise Rejected("record: bad field", f"{' and '.join(given)} differ: give only one of them")
    answer = next(iter(given.values()), None)
    row.left |= {"question": question} | ({} if answer is None else {"answer": answer})
    if not question.lstrip().startswith("[USER]"):
        return task.read(row, inline, counts)
    _, *found = _MARKER.split(question)
    if not found[-1].strip() and found[-2] == "ASSISTANT":  # the answer follows
        found = found[:-2]
    roles, turns = [role.lower() for role in found[::2]], [turn.strip() for turn in found[1::2]]
    if not all(turns) or roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or roles[-1] != "user":
        raise Rejected("record: bad message", "question: [USER] and [ASSISTANT] take turns, with text after each and an answer to the last")
    if len(turns) == 1:
        row.left["question"] = turns[0]
        return task.read(row, inline, counts)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    row.take_all("question", "answer")
    messages.append({"role": "assistant", "content": text(answer, "answer")})
    return {"style": "demo", "messages": messages, **row.take_all(*COMMON_FIELDS)}
