"""Names that people choose, made to fit where others take only some characters: readable, and two names never become one."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable

MAX_FILE_NAME = 200
"""Characters; file systems take 255 bytes, and some of our files have a longer name than their run."""
_CHANGED = re.compile(r"-sha[0-9a-f]{8}$")


def fitting(name: str, fits: Callable[[str], object], limit: int, flags: int = 0) -> str:
    """The name as it is if it fits; else its letters, digits, `-` and `_` with a hash of the whole name behind them.

    Args:
        name: any text.
        fits: whether a name can stay.
        limit: characters at most.
        flags: `re.ASCII` keeps ASCII letters only (ä becomes a).
    """
    if fits(name) and name.isprintable() and len(name) <= limit and not _CHANGED.search(name):
        return name
    text = unicodedata.normalize("NFKD" if flags & re.ASCII else "NFC", name)
    if flags & re.ASCII:
        text = text.encode("ascii", "ignore").decode()
    return _marked(re.sub(r"[^\w-]+", "_", text, flags=flags), name, limit)


def shortened(name: str, limit: int) -> str:
    """The beginning of a longer name, with a hash of it."""
    return name if len(name) <= limit else _marked(name, name, limit)


def _marked(text: str, name: str, limit: int) -> str:
    mark = f"-sha{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return text[: limit - len(mark)] + mark


def file_name(name: str) -> str:
    """A name as one folder or file, also in URLs, in Ray (which takes ASCII only) and on any file system."""
    return fitting(name, re.compile(r"\w(?:[\w .+=,()@-]*[\w+=,()@-])?", re.ASCII).fullmatch, MAX_FILE_NAME, re.ASCII)


def masked(uri: str) -> str:
    """An address without its user and password, for messages."""
    return re.sub(r"//[^/@]*@", "//***@", uri)
