"""Records as they are written out one by one: JSON lines, JSON arrays, WebDataset tars."""

from __future__ import annotations

import codecs
import json
import re
import tarfile
from typing import Any

import fsspec
import numpy as np

from molmo_core.config import ConfigError
from pipelines.data.records.content import is_base64
from pipelines.data.records.field_names import UNCLEAR, understood
from pipelines.data.records.record_file import RecordFile, mapping
from pipelines.data.rejects import Rejected

_BLOCK = 512
"""Bytes of a tar's blocks."""


class JsonLines(RecordFile):
    """One JSON object a line, UTF-8."""

    def __init__(self, path: str):
        super().__init__(path)
        starts, position, pieces = [0], 0, []
        with fsspec.open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                pieces.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position + 1)
                position += len(chunk)
        lines = np.concatenate([np.array(starts, np.int64), *pieces]) if pieces else np.array(starts, np.int64)
        ends = np.append(lines[1:], position) if lines[-1] < position else lines[1:]
        lines = lines[: len(ends)]
        used = ends - lines > 64  # shorter lines may be blank: looked at below
        for i in np.flatnonzero(~used):
            used[i] = bool(self._bytes(int(lines[i]), int(ends[i] - lines[i])).removeprefix(codecs.BOM_UTF8).strip())
        self._rows = np.flatnonzero(used)
        self._starts, self._ends = lines[self._rows], ends[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def row_number(self, i: int) -> int:
        return int(self._rows[i])

    def read(self, i: int) -> dict[str, Any]:
        return _parsed(self._bytes(int(self._starts[i]), int(self._ends[i] - self._starts[i])))


class JsonArray(RecordFile):
    """One JSON array of objects (LLaVA's form)."""

    def __init__(self, path: str):
        super().__init__(path)
        with fsspec.open(path, "rb") as file:
            try:
                self._data = json.loads(file.read())
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: not JSON: {error}") from None
        if not isinstance(self._data, list):
            raise ConfigError(
                f"{path}: a .json file of records is an array, found {type(self._data).__name__}; one object a line is .jsonl"
            )

    def __len__(self) -> int:
        return len(self._data)

    def read(self, i: int) -> dict[str, Any]:
        return mapping(self._data[i])


class WebDataset(RecordFile):
    """A tar whose files share a name up to the first dot: `0001.jpg` + `0001.json` (the record) or `0001.txt` (a caption).

    Any other file is a field of the record, named by what is behind that dot without `.json` or `.txt` (`0001.answer.txt`): the object in
    a .json, text, or bytes. Of a tar that is cut short, the last sample is rejected: some of its files may be missing.
    """

    IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
    VIDEOS = ("mp4", "mkv", "webm", "avi", "mov", "m4v")

    def __init__(self, path: str):
        super().__init__(path)
        self._samples: list[dict[str, tuple[int, int]]] = []
        newest: dict[str, int] = {}
        last, failure = -1, ""
        with fsspec.open(path, "rb") as file:
            try:
                # Tars that were joined with `cat` have end marks in the middle, which are passed over.
                with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                    for info in tar:
                        folder, _, name = info.name.rpartition("/")
                        if not info.isfile() or name.startswith("."):
                            continue
                        stem, _, extension = name.partition(".")
                        key, extension = f"{folder}/{stem}", extension.lower()
                        if key not in newest or extension in self._samples[newest[key]]:  # joined tars repeat their keys
                            newest[key] = len(self._samples)
                            self._samples.append({})
                        last = newest[key]
                        self._samples[last][extension] = (info.offset_data, info.size)
            except tarfile.TarError as error:
                failure = str(error)
            size = file.seek(0, 2)
            file.seek(max(0, size - _BLOCK))
            ended = not file.read(_BLOCK).strip(b"\0")
        self._cut = last if failure or not ended else -1
        if (failure or not ended) and len(self._samples) < 2:
            raise ConfigError(f"{path}: unreadable tar: {failure or 'no whole sample and no end mark in it'}")

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, i: int) -> dict[str, Any]:
        if i == self._cut:
            raise Rejected("record: truncated tar", f"{self.path} ends within or after this sample, without an end mark")
        files = dict(self._samples[i])
        images = sorted((e for e in files if e.rpartition(".")[2] in self.IMAGES and not _is_unclear(e)), key=_natural)
        videos = [e for e in files if e.rpartition(".")[2] in self.VIDEOS]
        if len(videos) > 1 or (videos and images):
            raise Rejected("record: too many media", f"one video, or images, in a sample; found {', '.join([*images, *videos])}")
        record = _parsed(self._file(files.pop("json"))) if "json" in files else {}
        media = [self._file(files.pop(e)) for e in images or videos]
        if media:
            _set_media(record, "video" if videos else "images" if len(media) > 1 else "image", media)
        for extension, member in files.items():
            self._add(record, extension, self._file(member))
        return record

    def _add(self, record: dict[str, Any], extension: str, data: bytes) -> None:
        """A file of another kind as a field, which is used or judged like any other."""
        name, _, suffix = extension.rpartition(".")
        value: Any
        if suffix == "json":
            name, value = name or suffix, _json(_decoded(data))
        elif suffix == "txt":
            value = _decoded(data).strip()
        else:
            name, value = extension or "file", _text_or_bytes(data)
        if not name:  # the sample's one text: the caption, which may also stand in its .json
            words = [record[field] for field in ("caption", "text", "messages") if record.get(field) is not None]
            name = "txt" if words else "caption"
            if value in (word.strip() for word in words if isinstance(word, str)):
                return
        if record.get(name) is None:
            record[name] = value
        elif record[name] != value and str(record[name]) != value:
            raise Rejected("record: bad field", f"{name}: once in the .json and once as a file of its own, with another value")

    def _file(self, member: tuple[int, int]) -> bytes:
        data = self._bytes(*member)
        if len(data) != member[1]:
            raise Rejected("record: truncated tar", f"{self.path}: {len(data)} of {member[1]} bytes")
        return data


def _set_media(record: dict[str, Any], name: str, media: list[bytes]) -> None:
    """The files of a sample, in place of the names that its record has for them."""
    found = [record.pop(field) for field in ({name} if name == "video" else {"image", "images"}) if record.get(field) is not None]
    references = [reference for value in found for reference in (value if isinstance(value, list) else [value])]
    if any(not isinstance(r, str) or r.startswith("data:") or is_base64(r) for r in references) or len(references) > len(media):
        raise Rejected("record: too many media", f"{name}: in the .json, and as a file beside it")
    record[name] = media if name == "images" else media[0]


def _is_unclear(extension: str) -> bool:
    """`seg.png`: nobody can say that it is asked about."""
    return bool(understood(extension.rpartition(".")[0]).words & UNCLEAR)


def _text_or_bytes(data: bytes) -> str | bytes:
    if b"\0" in data:
        return data
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return data


def _parsed(line: bytes) -> dict[str, Any]:
    return mapping(_json(_decoded(line)))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise Rejected("record: not JSON", str(error)) from None


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # with or without the byte order mark of Windows' editors
    except UnicodeDecodeError as error:
        raise Rejected("record: not UTF-8", str(error)) from None


def _natural(name: str) -> list[str | int]:
    """Sorts `img2` before `img10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
