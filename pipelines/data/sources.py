"""Record files as random-access tables: JSON lines, JSON arrays, Parquet, Hugging Face datasets on disk, WebDataset tars.

A source (a `RecordFile`) knows its length without reading records, gives any row by number, and travels to workers by pickling
(files are opened where they are used). A row that cannot be read is `Rejected`; a file that cannot be read at all is a `ConfigError`.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import glob
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np

from molmo_core.config import ConfigError, MissingFile
from pipelines.data.records import parts
from pipelines.data.records.files import JsonArray, JsonLines, WebDataset
from pipelines.data.records.record import Record
from pipelines.data.records.record_file import local_path
from pipelines.data.records.tables import HuggingFace, Parquet
from pipelines.data.rejects import Rejected

__all__ = ["Record", "Records", "Rejected", "Source", "find_records", "open_records"]

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".tar": "webdataset"}
_HINT = (
    "supported: .jsonl, .json (an array), .parquet, .tar (WebDataset), a Hugging Face dataset saved to disk, or a folder or glob of these"
)


class Source(Protocol):
    """A file of records (`RecordFile`)."""

    path: str
    version: tuple[int | None, int | str | None]

    def __len__(self) -> int: ...

    def row_number(self, i: int) -> int:
        """Number of record `i` in its file, from 0 (JSON lines: blank lines count)."""
        ...

    def read(self, i: int) -> dict[str, Any]:
        """Record `i`; raises `Rejected` if it cannot be read."""
        ...

    def text(self, i: int) -> dict[str, Any]:
        """Record `i`, where that saves time without the bytes of its media."""
        ...


class Records:
    """All records of a configured path, or a part of them, numbered through.

    Args:
        rows: int64, which of all; None = all.
    """

    def __init__(self, sources: list[Source], rows: np.ndarray | None = None):
        self.sources = sources
        self._rows = rows
        self._bounds = np.cumsum([0, *(len(s) for s in sources)]).tolist()

    def __len__(self) -> int:
        return self._bounds[-1] if self._rows is None else len(self._rows)

    def part(self, rows: np.ndarray) -> Records:
        """Those of these records; int64."""
        return Records(self.sources, rows if self._rows is None else self._rows[rows])

    def over(self, sources: list[Source]) -> Records:
        """The same rows of other sources of the same lengths."""
        return Records(sources, self._rows)

    def where(self, i: int) -> tuple[str, int]:
        """(file, row in the file) of record `i`."""
        source, k = self._find(i)
        return source.path, source.row_number(k)

    def __getitem__(self, i: int) -> Record:
        """Record `i`; raises `Rejected` if it cannot be read."""
        source, k = self._find(i)
        return Record(source.path, source.row_number(k), source.read(k))

    def text(self, i: int) -> Record:
        """Record `i` for measuring its text: where that saves time, a byte stands for the bytes of its media. Raises `Rejected`."""
        source, k = self._find(i)
        return Record(source.path, source.row_number(k), source.text(k))

    @property
    def stamp(self) -> list[list[Any]]:
        """[path, rows, bytes, time of change or ETag] of each source when it was opened: another one if its records changed
        since. Of a part also [number, checksum] of its rows."""
        sources: list[list[Any]] = [[s.path, len(s), *s.version] for s in self.sources]
        return sources if self._rows is None else [*sources, [len(self._rows), zlib.crc32(self._rows.tobytes())]]

    def _find(self, i: int) -> tuple[Source, int]:
        i = i if self._rows is None else int(self._rows[i])
        s = bisect.bisect_right(self._bounds, i) - 1
        return self.sources[s], i - self._bounds[s]


def find_records(path: str) -> list[str]:
    """The record files of a file, a folder or a glob; none is opened. Raises ConfigError if nothing is there."""
    with _explained(path):
        return _expand(local_path(path))


def open_records(path: str, format: str = "auto") -> Records:
    """Opens a file, a folder or a glob of record files, or a part of them that `jobs.prepare` held out.

    Args:
        path: local path or fsspec URL.
        format: `auto` goes by the suffix.

    Raises:
        ConfigError: nothing there, or a form that is not supported.
    """
    found = find_records(path)
    if path.endswith(parts.SUFFIX):
        part = parts.Part.read(*found)
        whole = open_records(part.records, part.format)
        part.check(path, whole.stamp)
        return whole.part(part.numbers())
    records = Records([_open(p, format) for p in found])
    if not len(records):
        raise ConfigError(f"{path}: no records in it")
    return records


def _expand(path: str) -> list[str]:
    if path.startswith(("http://", "https://")):
        return [path]  # has no folders
    if "://" in path:
        return _expand_url(path)
    if re.search(r"[*?\[]", path) and not Path(path).exists():
        found = sorted(str(Path(p)) for p in glob.glob(path, recursive=True) if _is_file(p) and _holds_records(path, p))
        if not found:
            raise MissingFile(f"{path}: no file matches", path)
        return found
    folder = Path(path)
    if not folder.exists():
        raise MissingFile(f"{path}: no such file or folder of records", path)
    if folder.is_file() or (folder / "state.json").is_file():
        return [path]
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise ConfigError(f"{path}: a Hugging Face dataset with splits; name one: " + ", ".join(f"{path}/{s}" for s in splits))
    return _of_folder(path, [str(p) for p in folder.iterdir()])


def _expand_url(path: str) -> list[str]:
    """The same on any filesystem of fsspec."""
    filesystem, root = fsspec.url_to_fs(path)
    _, chain, rest = path.partition("::")  # zip://*.jsonl::s3://bucket/all.zip

    def url(name: str) -> str:
        return f"{filesystem.unstrip_protocol(name)}{chain}{rest}"

    if re.search(r"[*?\[]", root) and not filesystem.exists(root):
        matches = filesystem.glob(root, detail=True).items()
        found = sorted(url(name) for name, info in matches if info["type"] == "file" and _holds_records(root, name))
        if not found:
            raise ConfigError(f"{path}: no file matches")
        return found
    if not filesystem.isdir(root):
        return [path]
    names = [name.rstrip("/") for name in filesystem.ls(root, detail=False)]
    if {"state.json", "dataset_dict.json"} & {os.path.basename(name) for name in names}:
        raise ConfigError(f"{path}: a Hugging Face dataset is mapped into memory: copy it to a local disk and name it there")
    return [url(name) for name in _of_folder(path, names)]


def _of_folder(folder: str, names: list[str]) -> list[str]:
    found = sorted(n for n in names if os.path.splitext(n)[1].lower() in _SUFFIXES and _holds_records("", os.path.basename(n)))
    if not found:
        raise ConfigError(f"{folder}: no record files in this folder ({_HINT})")
    return found


def _is_file(path: str) -> bool:
    """Whether a match of a glob is a file or what is opened like one; other folders are not looked into."""
    return Path(path).is_file() or Path(path).suffix.lower() in _SUFFIXES or Path(path, "state.json").is_file()


def _holds_records(pattern: str, name: str) -> bool:
    """False of hidden files and folders below the fixed part of the pattern, and of what jobs write beside records."""
    fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    *folders, file = name[len(fixed) :].split("/")
    return not any(part.startswith(".") for part in (*folders, file)) and not f".{file}".endswith((".inventory.parquet", parts.SUFFIX))


def _open(path: str, format: str) -> Source:
    if format == "auto":
        if "://" not in path and (Path(path) / "state.json").is_file():
            format = "huggingface"
        else:
            name = re.split(r"::|\?", path)[0] if "://" in path else path  # zip://a.jsonl::all.zip, https://host/a.jsonl?key
            format = _SUFFIXES.get(os.path.splitext(name)[1].lower(), "")
    kinds: dict[str, Any] = {
        "jsonl": JsonLines,
        "json": JsonArray,
        "parquet": Parquet,
        "huggingface": HuggingFace,
        "webdataset": WebDataset,
    }
    if format not in kinds:
        raise ConfigError(f"{path}: cannot tell what kind of records this is ({_HINT})")
    with _explained(path):
        source: Source = kinds[format](path)
        if path.startswith(("http://", "https://")) and len(source):
            with contextlib.suppress(Rejected):
                # A server that gives no parts of files shows here, not in the middle of a run; a copy has nothing in its handles yet.
                copy.copy(source).read(len(source) - 1)
        return source


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Whatever a filesystem raises, as a `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{path}: a package for this kind of URL is missing: {error}") from None
    except ValueError as error:
        if not path.startswith(("http://", "https://")):
            raise ConfigError(f"{path}: unreadable: {error}") from error
        raise ConfigError(f"{path}: its server gives no parts of files (range requests): copy the file to a disk or a bucket") from error
    except OSError as error:
        raise ConfigError(f"{path}: unreadable: {error}") from None
    except Exception as error:  # of cloud storage clients, of archives
        raise ConfigError(f"{path}: unreadable: {type(error).__name__}: {error}") from error
