"""What a value holds, whatever its field is called: a picture, a video, a sound, or none of them."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np

Medium = Literal["image", "video", "audio"]

_SUFFIXES: dict[Medium, str] = {
    "image": "jpg|jpeg|jpe|jfif|png|webp|gif|bmp|tif|tiff|avif|heic|heif|ppm|pgm|jp2|svg",
    "video": "mp4|mkv|webm|avi|mov|m4v|mpg|mpeg|wmv|flv|ogv|3gp",
    "audio": "mp3|wav|flac|ogg|oga|m4a|aac|opus|wma",
}
_SUFFIX = re.compile(r"\.(?:" + "|".join(f"(?P<{kind}>{names})" for kind, names in _SUFFIXES.items()) + r")(?:[?#]\S*)?\s*$", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(image|video|audio)/")
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{20,}$")
"""Pictures in base64 without the head of a data URL: PNG, JPEG, GIF, WebP."""
_NO_MEDIA = (b"\x93NUMPY", b"PK\3\4", b"\x80")
"""Arrays, archives, pickles."""
_LONGEST_PATH = 4096
_HOLDS = (str, bytes, bytearray, dict, list, tuple, np.ndarray)


def medium(value: Any) -> Medium | None:
    """The kind of medium that a value holds or refers to, at any depth; of several kinds the first."""
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _of_bytes(bytes(value[:16]))
    if isinstance(value, dict):
        return next((found for item in value.values() if (found := medium(item))), None)
    if isinstance(value, list | tuple):
        nested = (item for item in value if isinstance(item, _HOLDS))
        return next((found for item in nested if (found := medium(item))), None)
    if isinstance(value, np.ndarray):
        return "image" if value.ndim > 1 or value.dtype == np.uint8 else medium(value.tolist()) if value.dtype == object else None
    return "image" if hasattr(value, "__array_interface__") else None  # a Pillow image


def is_base64(value: Any) -> bool:
    """Whether a text is a picture in base64, without `data:image/...;base64,` before it."""
    return isinstance(value, str) and _BASE64.match(value) is not None


def _of_text(value: str) -> Medium | None:
    if (url := _DATA_URL.match(value)) is not None:
        return url[1]  # type: ignore[return-value]
    if len(value) <= _LONGEST_PATH and "\n" not in value.strip() and (suffix := _SUFFIX.search(value)) is not None:
        return suffix.lastgroup  # type: ignore[return-value]
    return "image" if is_base64(value) else None


def _of_bytes(head: bytes) -> Medium | None:
    if head.startswith(_NO_MEDIA):
        return None
    if head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"heic", b"mif1", b"M4A "):
        return "video"
    if head.startswith(b"\x1a\x45\xdf\xa3") or (head.startswith(b"RIFF") and head[8:12] == b"AVI "):
        return "video"
    if head.startswith((b"ID3", b"fLaC", b"OggS")) or head[8:12] == b"M4A " or (head.startswith(b"RIFF") and head[8:12] == b"WAVE"):
        return "audio"
    return "image"
