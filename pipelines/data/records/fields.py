"""The fields of a row or of a part of it: which were used, and checks of their values that all forms share."""

from __future__ import annotations

import itertools
import json
import re
import reprlib
from typing import Any

from pipelines.data.rejects import Rejected

_LONGEST_S = 1e9


class Fields:
    """What is left of a row, or of an object in it: a form takes the fields that it uses, `unread.judge` looks at the rest.

    Attributes:
        left: the fields that nobody took; nulls are fields that are not there.
        where: precedes a field's name in reasons (`messages[0].`).
    """

    __slots__ = ("left", "where")

    def __init__(self, data: dict[str, Any], where: str = ""):
        self.left = {name: value for name, value in data.items() if value is not None}
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field, which is used by that."""
        return self.left.pop(name, default)

    def take_all(self, *names: str) -> dict[str, Any]:
        """Those of the fields that are there."""
        return {name: self.left.pop(name) for name in names if name in self.left}


def text(value: Any, field: str) -> str:
    """A field's value, which must be text."""
    if not isinstance(value, str) or not value.strip():
        raise Rejected(
            "record: bad field", f"{field}: text is needed, found {'an empty one' if isinstance(value, str) else reprlib.repr(value)}"
        )
    check_unicode(value, field)
    return value


def objects(value: Any, field: str, empty: str) -> list[Any]:
    """A list that is not empty, also one that was written as JSON text, or as columns (an object of lists: Hugging Face's sequences).

    Args:
        empty: the reason's category.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            reason = f"{field}: a list is needed, found a text that is not JSON: {reprlib.repr(value)}"
            raise Rejected("record: bad field", reason) from None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        rows = [dict(zip(value, row)) for row in itertools.zip_longest(*value.values())]
        value = rows if len({len(column) for column in value.values()}) == 1 else value
    if not isinstance(value, list):
        raise Rejected("record: bad field", f"{field}: a list is needed, found {type(value).__name__} {reprlib.repr(value)}")
    if not value:
        raise Rejected(empty, f"{field} is an empty list")
    return value


def seconds(value: Any, field: str) -> float:
    """A time, 0 or later."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LONGEST_S:
        raise Rejected("record: bad field", f"{field}: a number of seconds is needed, found {reprlib.repr(value)}")
    return value


def whole_number(value: Any, field: str) -> int:
    """0 or more, as a number or as text."""
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.0+)?", str(value)):
        raise Rejected("record: bad field", f"{field}: a whole number is needed, found {reprlib.repr(value)}")
    return int(float(value))


def check_unicode(value: str, field: str) -> None:
    """JSON can write half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Rejected("record: bad field", f"{field}: not valid Unicode (half of a surrogate pair), found {reprlib.repr(value)}") from None


def check_texts(value: Any, field: str) -> None:
    """Every text in a value is valid Unicode."""
    if isinstance(value, str):
        check_unicode(value, field)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_texts(key, f"{field}: key")
            check_texts(item, f"{field}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, str | dict | list):
                check_texts(item, f"{field}[{i}]")
