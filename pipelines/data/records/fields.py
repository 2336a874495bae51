"""Values of a record's fields: what is checked of each alike."""

from __future__ import annotations

import reprlib
from typing import Any

from pipelines.data.rejects import Rejected


def text(value: Any, field: str) -> str:
    """A field's value, which must be text."""
    if not isinstance(value, str) or not value.strip():
        raise Rejected(
            "record: bad field", f"{field}: text is needed, found {'an empty one' if isinstance(value, str) else reprlib.repr(value)}"
        )
    check_unicode(value, field)
    return value


def check_unicode(value: str, field: str) -> None:
    """JSON can write half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Rejected("record: bad field", f"{field}: not valid Unicode (half of a surrogate pair), found {reprlib.repr(value)}") from None
