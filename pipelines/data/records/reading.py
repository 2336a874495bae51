"""From a row as someone wrote it to an example that a preprocessor takes.

A row has one of the forms in `forms/`, told by its fields; `FORMS` tries them in turn. A form takes the fields that it uses, media are
found by `row_media`, and what is left is counted or rejects the row (`unread`). docs/data.md shows each form, and how to add one.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from types import ModuleType
from typing import Any

from molmo_core.preprocessing.task_fields import medium_needed
from pipelines.data.records import unread
from pipelines.data.records.fields import Fields, check_texts
from pipelines.data.records.forms import chat, llava, message_list, pixmo, task
from pipelines.data.records.record import Record
from pipelines.data.records.row_media import Inline, kind_and_count, read_media, resolver
from pipelines.data.rejects import Rejected

FORMS: tuple[ModuleType, ...] = (chat, llava, message_list, pixmo, task)
"""Each has `fits(row)`, whether it is meant, and `read(row, inline, counts)`, the example without its media."""


def read_record(record: Record, counts: Counter[str] | None = None) -> dict[str, Any]:
    """The example of a record, media still as references (absolute paths, URLs or bytes).

    Args:
        counts: counts the names of the fields that were not used.

    Returns:
        `image`, `images` or `video` (or none of them), `messages` or the fields of a task, and `metadata`.

    Raises:
        Rejected: what field is wrong, in words for the report. Nothing else: no row stops a run.
    """
    found: Counter[str] = Counter()
    try:
        example = _example(Fields(record.data), record.source, found)
    except Rejected:
        raise
    except Exception as error:  # a case not thought of; counted and reported with its type, as in `ExampleBuilder.build`
        raise Rejected("record: cannot be read", f"{type(error).__name__}: {error}") from error
    if counts is not None:
        counts.update(found)
    return example


def _example(row: Fields, source: str, counts: Counter[str]) -> dict[str, Any]:
    inline = Inline()
    metadata = _metadata(row)
    form = next(form for form in FORMS if form.fits(row))
    example = form.read(row, inline, counts)
    media = read_media(row, inline, resolver(source), counts)
    own, count = kind_and_count(media)
    if row.left:
        unread.judge(row, counts, own, count)
    if own is None:
        for name, value in metadata.items():
            unread.check_no_medium(value, name if name == "id" else f"metadata.{name}")
    _check_media(example, own, form)
    if "messages" in example:
        example = task.checked(example)
    example |= media
    example["metadata"] = metadata
    for field, value in example.items():
        check_texts(value, field)
    return example


def _metadata(row: Fields) -> dict[str, Any]:
    """`metadata`, with the record's `id`: what is kept beside the example."""
    metadata = row.take("metadata", {})
    if not isinstance(metadata, dict):
        raise Rejected("record: bad field", f"metadata: an object is needed, found {reprlib.repr(metadata)}")
    if "id" not in row:
        return metadata
    identity = row.take("id")
    check_texts(identity, "id")
    return {"id": identity, **metadata}


def _check_media(example: dict[str, Any], own: str | None, form: ModuleType) -> None:
    """That nothing is asked about a picture or a video that the record does not have."""
    if own is None and form is pixmo:
        raise Rejected("record: no medium", "there is no picture that it is about: write image or image_url")
    for item in example.get("message_list", [example]):
        style = item.get("style", example.get("style")) or ""
        needed = medium_needed(item, style)
        if needed is not None and (own is None or (needed == "video" and own != "video")):
            raise Rejected("record: no medium", f"style {style!r} needs {'a video' if needed == 'video' else 'an image or a video'}")
