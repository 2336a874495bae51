"""Message trees: `message_list`, several tasks or conversations about the same media."""

from __future__ import annotations

from collections import Counter
from typing import Any

from molmo_core.preprocessing.task_fields import COMMON_FIELDS
from pipelines.data.records import unread
from pipelines.data.records.fields import Fields, objects
from pipelines.data.records.forms import chat, task
from pipelines.data.records.row_media import Inline
from pipelines.data.rejects import Rejected

MAX_ANNOTATIONS = 1000
"""A record with more annotations is rejected: it is a mistake in whatever wrote it."""
_ANSWERS = frozenset({"messages", "answer", "answers", "answer_idx", "text", "points", "image_points", "tracks"})


def fits(row: Fields) -> bool:
    """Whether a row is of this form."""
    return "message_list" in row


def read(row: Fields, inline: Inline, counts: Counter[str]) -> dict[str, Any]:
    """`message_list`, and the settings beside it."""
    items = objects(row.take("message_list"), "message_list", "record: no annotations")
    if len(items) > MAX_ANNOTATIONS:
        raise Rejected("record: too many annotations", f"{len(items):,} in message_list, at most {MAX_ANNOTATIONS:,}")
    for name in ("system", "system_prompt", "system_message"):
        if row.left.get(name):
            raise Rejected("record: bad field", f"{name}: message_list has several questions; write it into each of them, as {name}")
    settings = row.take_all(*COMMON_FIELDS)
    return {"message_list": [_item(item, f"message_list[{i}]", settings.get("style"), counts) for i, item in enumerate(items)], **settings}


def _item(item: Any, where: str, style: Any, counts: Counter[str]) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise Rejected("record: bad field", f"{where}: an object is needed, found {type(item).__name__}")
    fields, inline = Fields(item, f"{where}."), Inline()
    kind = fields.take_all("type")  # an evaluation counts by it
    made = (chat.read if chat.fits(fields) else task.read)(fields, inline, counts, *(() if chat.fits(fields) else (style,)))
    if inline.parts:
        raise Rejected("record: bad message", f"{where}: the annotations of a tree share its media; write them beside message_list")
    if not _ANSWERS & made.keys():
        raise Rejected("record: no answer", f"{where}: none of {', '.join(sorted(_ANSWERS))}; fields: {sorted(item)}")
    unread.judge(fields, counts, own="image", number=0)
    return made | kind
