"""Files whose rows are not records: `fields` says what each field of a record is made of.

A field is made of a column (`question`, `meta.answer`, `answers[].text`: of each entry), of text with columns in it
(`videos/{video_id}.mp4`; `{source}` is the name of the record file without its ending), or of the same text for all rows (`=vqa2`). A
list of these gives a list. A column may be converted: `answer!int`. What a row does not have, or has as null, its record does not have.
Fields called `truth.*` are not shown to the model.
"""

from __future__ import annotations

import ast
import re
import reprlib
import string
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_core.config import ConfigError
from pipelines.data.rejects import Rejected

if TYPE_CHECKING:  # a configuration knows this file, and reading records takes long to import
    from pipelines.data.sources import Records, Source

_MEDIA = ("image", "images", "video", "start", "end", "subtitles")
_TASK = (
    "question", "answer", "answers", "options", "unlabelled_options", "option_names", "answer_idx", "count", "label", "points",
    "point_scale", "text", "style", "type",
)  # fmt: skip
_TRUTH = ("truth.boxes", "truth.masks", "truth.spans", "truth.category")
FIELDS = (*_MEDIA, *_TASK, *_TRUTH)
"""The fields of a record that can be made."""
_COLUMN = re.compile(r"(?P<path>[\w -]+(?:\[\])?(?:\.[\w -]+(?:\[\])?)*)(?:!(?P<conversion>\w+))?")


def _literal(value: Any) -> Any:
    """A list that was written as text."""
    return ast.literal_eval(value) if isinstance(value, str) else value


def _unlettered(value: Any) -> Any:
    """Options without the letters before them: "A. red" → "red"."""
    return [re.sub(r"^\(?[A-Z][.):]\s*", "", str(option)) for option in value]


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "list": _literal,
    "unlettered": _unlettered,
    "masks": lambda value: [np.asarray(mask, bool) for mask in value],
}
"""What may stand behind a column."""


def check_fields(fields: Mapping[str, str | list[str]]) -> None:
    """Raises ConfigError for a field that no record has, or for something that is not a column, a text or a list of them."""
    for field, made_of in fields.items():
        if field not in FIELDS:
            raise ConfigError(f"fields.{field}: records have {', '.join(FIELDS)}")
        for part in made_of if isinstance(made_of, list) else [made_of]:
            _check(part, f"fields.{field}")


def _check(part: str, where: str) -> None:
    if part.startswith("="):
        return
    if "{" in part:
        try:
            list(string.Formatter().parse(part))
        except ValueError as error:
            raise ConfigError(f"{where}: {part!r}: {error}") from None
        return
    column = _COLUMN.fullmatch(part)
    if column is None:
        raise ConfigError(f"{where}: {part!r} is not a column, nor text with {{columns}}, nor =text")
    if column["conversion"] not in (None, *CONVERSIONS):
        raise ConfigError(f"{where}: no conversion is called {column['conversion']!r}; there are {', '.join(CONVERSIONS)}")


def mapped(records: Records, fields: Mapping[str, str | list[str]]) -> Records:
    """Records whose rows are made by `fields`, checked by `check_fields`; without fields the same."""
    return records.over([_Mapped(source, dict(fields)) for source in records.sources]) if fields else records


class _Mapped:
    """A source whose rows are made from those of another."""

    def __init__(self, source: Source, fields: dict[str, str | list[str]]):
        self._source, self._fields = source, fields
        self.path, self.version = source.path, source.version

    def __len__(self) -> int:
        return len(self._source)

    def row_number(self, i: int) -> int:
        return self._source.row_number(i)

    def read(self, i: int) -> dict[str, Any]:
        return record_of(self._source.read(i), self._fields, self.path)

    def text(self, i: int) -> dict[str, Any]:
        return record_of(self._source.text(i), self._fields, self.path)


def record_of(row: dict[str, Any], fields: Mapping[str, str | list[str]], source: str) -> dict[str, Any]:
    """The record that a row is made into: its media, and one annotation.

    Raises:
        Rejected: a text with columns of which one is not there, or a column that cannot be converted.
    """
    columns = {"source": PurePosixPath(source).name.split(".")[0], **row}
    made: dict[str, Any] = {}
    for field, made_of in fields.items():
        if isinstance(made_of, list):
            value: Any = [part for part in (_value(columns, part, field) for part in made_of) if part is not None]
        else:
            value = _value(columns, made_of, field)
        if value is not None and not (isinstance(value, list) and not value and field in ("options", "images")):
            made[field] = value
    return {
        **{field: value for field, value in made.items() if field in _MEDIA},
        "message_list": [{field: value for field, value in made.items() if field in _TASK}],
        "metadata": {"truth": {field.removeprefix("truth."): value for field, value in made.items() if field in _TRUTH}},
    }


def _value(row: dict[str, Any], part: str, field: str) -> Any:
    if part.startswith("="):
        return part[1:]
    if "{" in part:
        try:
            return part.format_map(row)
        except KeyError as error:
            reason = f"fields.{field}: there is no {error.args[0]} among {', '.join(row)}"
            raise Rejected("record: no such column", reason) from None
    column = _COLUMN.fullmatch(part)
    assert column is not None
    value = _column(row, column["path"], field)
    if value is None or column["conversion"] is None:
        return value
    try:
        return CONVERSIONS[column["conversion"]](value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        reason = f"fields.{field}: {column['path']} is not what {column['conversion']} converts: {reprlib.repr(value)}"
        raise Rejected("record: bad column", reason) from None


def _column(value: Any, path: str, field: str) -> Any:
    name, _, rest = path.partition(".")
    key = name.removesuffix("[]")
    value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return None
    if not name.endswith("[]"):
        return _column(value, rest, field) if rest else value
    if not isinstance(value, list | tuple):
        raise Rejected("record: bad column", f"fields.{field}: {key} is not a list: {reprlib.repr(value)}")
    return [_column(entry, rest, field) if rest else entry for entry in value]
