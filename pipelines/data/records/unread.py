"""Fields that no form has read: counted by name where they only describe the record, else the row is rejected by that name.

The rule: a field is counted if it is empty, if the last word of its name describes the record (an id, a source, a licence, a split, a
score, ...: `field_names.DESCRIBES`), or if its name is unknown and its value is a number or a code of one word. It rejects the row if it
holds or names a medium that the example would lack, if a word of its name changes what is asked, answered or trained
(`field_names.CHANGES`), or if it holds a text or a structure that nobody can say to be harmless; inside of messages, parts and points,
where every field acts on the text beside it, unknown names always do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from molmo_core.preprocessing.task_fields import READ_FIELDS
from pipelines.data.records import field_names
from pipelines.data.records.content import Medium, is_base64, medium
from pipelines.data.records.field_names import FieldName, understood
from pipelines.data.records.fields import Fields
from pipelines.data.rejects import Rejected

_CODE = re.compile(r"\S{0,64}|\d{4}-\d\d-\d\d \S{0,64}")
_TASK_FIELDS = frozenset({"messages", "conversations", "message_list", "caption"}).union(*READ_FIELDS.values())
_A = {"image": "an image", "video": "a video"}
_HELP = "if it only describes the record, move it into metadata"


def judge(fields: Fields, counts: Counter[str], own: Medium | None = None, number: int = 1, inside: bool = False) -> None:
    """Counts what is left of a row or of an object in it, or rejects the row.

    Args:
        counts: of the names, with `[]` for the number of a message, part or point.
        own: the kind of medium that the example has.
        number: how many of them.
        inside: an object in a row, of which all fields must be known.

    Raises:
        Rejected: names the field, and says what to write instead.
    """
    for field, value in fields.left.items():
        _check(str(field), value, fields.where, own, number, inside)
        count(fields, str(field), counts)


def count(fields: Fields, field: str, counts: Counter[str]) -> None:
    """Counts a field that is not used, under one name for all messages, parts and points."""
    counts[re.sub(r"\[\d+\]", "[]", f"{fields.where}{field}")] += 1


def find_medium(row: Fields) -> tuple[str, Medium] | None:
    """The one unread field whose value must be the medium of a row that has no other.

    Raises:
        Rejected: there is one that cannot be it, or there are several.
    """
    found = list(_media(row.left))
    for field, kind in found:
        if kind == "audio":
            raise Rejected("record: unread medium", f"{row.where}{field}: sound is not read; {_HELP}")
    usable = [(field, kind) for field, kind in found if _may_be_asked_about(understood(str(field)))]
    if not found:
        return None
    if len(usable) > 1:
        names = ", ".join(str(field) for field, _ in usable)
        raise Rejected("record: unread medium", f"{names}: which of them is asked about? write image, images or video")
    field, kind = (usable or found)[0]
    value = row.left[field]
    if not usable:
        reason = f"is this the {kind} that is asked about? then write {kind}"
    elif isinstance(value, list | tuple) and len(value) > 1:
        reason = f"of several {kind}s the order counts: write images, or one video"
    else:
        return field, kind
    raise Rejected("record: unread medium", f"{row.where}{field}: {reason}")


def check_no_medium(value: Any, field: str) -> None:
    """That a row without media has none where only descriptions stand (id, metadata)."""
    if (kind := medium(value)) is not None and kind != "audio":
        raise Rejected("record: unread medium", f"{field}: holds or names {_A[kind]}, but the record has none: write {kind}")


def _media(left: dict[str, Any]) -> Iterator[tuple[str, Medium]]:
    """The fields that hold media, by content, or by name ({"img": "a"})."""
    for field, value in left.items():
        if not _is_empty(value) and (kind := _medium(understood(str(field)), value)) is not None:
            yield field, kind


def _medium(name: FieldName, value: Any) -> Medium | None:
    return medium(value) or (name.medium if isinstance(value, str | dict | list | tuple) else None)


def _may_be_asked_about(name: FieldName) -> bool:
    return not name.words & field_names.UNCLEAR and (name.is_file or name.medium is not None or not (name.describes or name.changes))


def _check(field: str, value: Any, where: str, own: Medium | None, number: int, inside: bool) -> None:
    if _is_empty(value):
        return
    name = understood(field)
    kind = _medium(name, value)
    if kind == "audio":
        raise Rejected("record: unread medium", f"{where}{field}: sound is not read; {_HELP}")
    if kind is not None and not _is_origin(name, value, kind, own, number):
        raise Rejected(
            "record: unread medium",
            f"{where}{field}: this {kind} is not read{' beside the others' if own else ''}; media are image, images, video or parts of "
            f"messages{f'; {_HELP}' if own else ''}",
        )
    if kind is not None or (name.describes and (own or inside or name.speaks_of is None)):
        return
    if own is None and not inside and name.speaks_of in ("image", "video") and not isinstance(value, bool) and value != 0:
        raise Rejected(
            "record: unread medium", f"{where}{field} speaks of {_A[name.speaks_of]}, but the record has none: write {name.speaks_of}"
        )
    if inside or not (_is_number_of(field, name, value) or (_is_code(value) and not name.changes)):
        reason = f"{where}{field}: not read, and it may change the meaning"
        raise Rejected("record: unread field", f"{reason}; {_advice(field, name)}, or {_HELP}")


def _is_origin(name: FieldName, value: Any, kind: Medium, own: Medium | None, number: int) -> bool:
    """Whether it only says where the media that the example has are from."""
    if own is None or not _is_reference(value) or (isinstance(value, list | tuple) and len(value) > number):
        return False
    unclear = name.words & (field_names.UNCLEAR - {"source", "original"})
    return name.describes and (own == kind or name.speaks_of is None) and not unclear


def _is_reference(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_reference, value))
    return isinstance(value, str) and not value.startswith("data:") and not is_base64(value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple | dict) and not (value.strip() if isinstance(value, str) else value)


def _is_number_of(field: str, name: FieldName, value: Any) -> bool:
    """`num_answers`, `has_audio`."""
    return isinstance(value, bool | int | float) and bool(name.words & field_names.COUNTS) and field not in field_names.CHANGES


def _is_code(value: Any) -> bool:
    """A number, a date, a word, or a list of them."""
    if isinstance(value, str):
        return _CODE.fullmatch(value) is not None
    if isinstance(value, list | tuple):
        return all(not isinstance(item, list | tuple) and _is_code(item) for item in value)
    return not isinstance(value, dict | bytes) and not hasattr(value, "__array_interface__")


def _advice(field: str, name: FieldName) -> str:
    if field in _TASK_FIELDS:
        return "a record is one task: write several as a message_list"
    for words, advice in (
        (field_names.TRAINS, "write weight (0 = no loss, 1 = as usual)"),
        (field_names.SYSTEM, "write system beside messages or a question"),
        (field_names.OPTIONS | field_names.LETTERS, "write options and answer_idx"),
        (field_names.ANSWERS, "if it is the answer, write it as answer"),
    ):
        if name.words & words:
            return advice
    return "write it into the question or a message"
