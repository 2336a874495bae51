"""Record files as random-access tables: JSON lines, JSON arrays, Parquet, Hugging Face datasets on disk, WebDataset tars.

A source knows its length without reading records, gives any row by number, and travels to workers by pickling (files are
opened where they are used). A row that cannot be read is `Rejected`; a file that cannot be read at all is a `ConfigError`.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import re
import tarfile
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from molmo_core.config import ConfigError

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".tar": "webdataset"}
_HINT = (
    "supported: .jsonl, .json (an array), .parquet, .tar (WebDataset), a Hugging Face dataset saved to disk, or a folder or glob of these"
)


class Rejected(Exception):
    """One record that cannot be used: `reason` is the category that reports count, `detail` the particulars."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclasses.dataclass
class Record:
    """One row as it stands in its file."""

    source: str
    row: int
    data: dict[str, Any]


class Source(Protocol):
    """A file of records."""

    path: str

    def __len__(self) -> int: ...

    def row_number(self, i: int) -> int:
        """Number of record `i` in its file, from 0 (JSON lines: blank lines count)."""
        ...

    def read(self, i: int) -> dict[str, Any]:
        """Record `i`; raises `Rejected` if it cannot be read."""
        ...


class _Opened:
    """Base of the sources: keeps open handles (names that begin with `_open`) out of pickles."""

    path: str

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_open")}

    def row_number(self, i: int) -> int:
        return i


class JsonLines(_Opened):
    """One JSON object a line, UTF-8."""

    def __init__(self, path: str):
        self.path = path
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
            used[i] = bool(self._bytes(int(lines[i]), int(ends[i])).strip())
        self._rows = np.flatnonzero(used)
        self._starts, self._ends = lines[self._rows], ends[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def row_number(self, i: int) -> int:
        return int(self._rows[i])

    def read(self, i: int) -> dict[str, Any]:
        line = self._bytes(int(self._starts[i]), int(self._ends[i]))
        try:
            data = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Rejected("record: not UTF-8", str(error)) from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise Rejected("record: not JSON", str(error)) from None
        return _mapping(data)

    def _bytes(self, start: int, end: int) -> bytes:
        file = self.__dict__.get("_open_file")
        if file is None:
            file = self._open_file = fsspec.open(self.path, "rb").open()
        file.seek(start)
        return file.read(end - start)


class JsonArray(_Opened):
    """One JSON array of objects (LLaVA's form)."""

    def __init__(self, path: str):
        self.path = path
        with fsspec.open(path, "rb") as file:
            try:
                self._data = json.loads(file.read())
            except ValueError as error:
                raise ConfigError(f"{path}: not JSON: {error}") from None
        if not isinstance(self._data, list):
            raise ConfigError(
                f"{path}: a .json file of records is an array, found {type(self._data).__name__}; one object a line is .jsonl"
            )

    def __len__(self) -> int:
        return len(self._data)

    def read(self, i: int) -> dict[str, Any]:
        return _mapping(self._data[i])


class Parquet(_Opened):
    """Columns are the record's fields; media columns hold paths, URLs, bytes or {bytes, path}."""

    def __init__(self, path: str):
        self.path = path
        metadata = self._file().metadata
        self._bounds = np.cumsum([0, *(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, i: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._bounds, i, side="right")) - 1
        cached = self.__dict__.get("_open_group")
        if cached is None or cached[0] != group:
            try:
                cached = self._open_group = (group, self._file().read_row_group(group))
            except (pa.ArrowException, OSError) as error:
                raise Rejected("record: unreadable row group", str(error)) from None
        return _row(cached[1], i - int(self._bounds[group]))

    def _file(self) -> pq.ParquetFile:
        file = self.__dict__.get("_open_file")
        if file is None:
            try:
                file = self._open_file = pq.ParquetFile(fsspec.open(self.path, "rb").open())
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(f"{self.path}: not a Parquet file: {error}") from None
        return file


class HuggingFace(_Opened):
    """A dataset (one split) written by `datasets.Dataset.save_to_disk`, memory-mapped."""

    def __init__(self, path: str):
        self.path = path
        state = json.loads((Path(path) / "state.json").read_text())
        self._files = [str(Path(path) / entry["filename"]) for entry in state["_data_files"]]
        self._length = self._table().num_rows

    def __len__(self) -> int:
        return self._length

    def read(self, i: int) -> dict[str, Any]:
        return _row(self._table(), i)

    def _table(self) -> pa.Table:
        table = self.__dict__.get("_open_table")
        if table is None:
            try:
                table = pa.concat_tables([pa.ipc.open_stream(pa.memory_map(f)).read_all() for f in self._files])
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(f"{self.path}: unreadable Hugging Face dataset: {error}") from None
            self._open_table = table
        return table


class WebDataset(_Opened):
    """A tar whose files share a name up to the first dot: `0001.jpg` + `0001.json` (the record) or `0001.txt` (a caption)."""

    IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
    VIDEOS = ("mp4", "mkv", "webm", "avi", "mov", "m4v")

    def __init__(self, path: str):
        self.path = path
        members: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file) as tar:
                for info in tar:
                    if info.isfile():
                        folder, _, name = info.name.rpartition("/")
                        stem, _, extension = name.partition(".")
                        members.setdefault(f"{folder}/{stem}", {})[extension.lower()] = (info.offset_data, info.size)
        except tarfile.TarError as error:
            raise ConfigError(f"{path}: unreadable tar: {error}") from None
        self._members = list(members.values())

    def __len__(self) -> int:
        return len(self._members)

    def read(self, i: int) -> dict[str, Any]:
        members = self._members[i]
        record: dict[str, Any] = {}
        if "json" in members:
            try:
                record = _mapping(json.loads(self._bytes(members["json"])))
            except ValueError as error:
                raise Rejected("record: not JSON", str(error)) from None
        if "txt" in members and "text" not in record and "messages" not in record:
            try:
                record["caption"] = self._bytes(members["txt"]).decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise Rejected("record: not UTF-8", str(error)) from None
        images = [e for e in members if e.rpartition(".")[2] in self.IMAGES]
        videos = [e for e in members if e.rpartition(".")[2] in self.VIDEOS]
        if images:
            data = [self._bytes(members[e]) for e in sorted(images)]
            record |= {"images": data} if len(data) > 1 else {"image": data[0]}
        elif videos:
            record["video"] = self._bytes(members[videos[0]])
        return record

    def _bytes(self, member: tuple[int, int]) -> bytes:
        file = self.__dict__.get("_open_file")
        if file is None:
            file = self._open_file = fsspec.open(self.path, "rb").open()
        file.seek(member[0])
        data = file.read(member[1])
        if len(data) != member[1]:
            raise Rejected("record: truncated tar", f"{self.path}: {len(data)} of {member[1]} bytes")
        return data


class Records:
    """All records of a configured path, numbered through."""

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self._bounds = np.cumsum([0, *(len(s) for s in sources)]).tolist()

    def __len__(self) -> int:
        return self._bounds[-1]

    def where(self, i: int) -> tuple[str, int]:
        """(file, row in the file) of record `i`."""
        source, k = self._find(i)
        return source.path, source.row_number(k)

    def __getitem__(self, i: int) -> Record:
        """Record `i`; raises `Rejected` if it cannot be read."""
        source, k = self._find(i)
        return Record(source.path, source.row_number(k), source.read(k))

    def _find(self, i: int) -> tuple[Source, int]:
        s = bisect.bisect_right(self._bounds, i) - 1
        return self.sources[s], i - self._bounds[s]


def open_records(path: str, format: str = "auto") -> Records:
    """Opens a file, a folder or a glob of record files.

    Args:
        path: local path or fsspec URL.
        format: `auto` goes by the suffix.

    Raises:
        ConfigError: nothing there, or a form that is not supported.
    """
    sources = [_open(p, format) for p in _expand(path)]
    records = Records(sources)
    if not len(records):
        raise ConfigError(f"{path}: no records in it")
    return records


def _expand(path: str) -> list[str]:
    if "://" in path:
        return [path]
    if re.search(r"[*?\[]", path) and not Path(path).exists():
        found = sorted(str(p) for p in Path(path).parent.glob(Path(path).name))
        if not found:
            raise ConfigError(f"{path}: no file matches")
        return found
    folder = Path(path)
    if not folder.exists():
        raise ConfigError(f"{path}: no such file or folder of records")
    if folder.is_file() or (folder / "state.json").is_file():
        return [path]
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise ConfigError(f"{path}: a Hugging Face dataset with splits; name one: " + ", ".join(f"{path}/{s}" for s in splits))
    found = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise ConfigError(f"{path}: no record files in this folder ({_HINT})")
    return found


def _open(path: str, format: str) -> Source:
    if format == "auto":
        if "://" not in path and (Path(path) / "state.json").is_file():
            format = "huggingface"
        else:
            format = _SUFFIXES.get(Path(path).suffix.lower(), "")
    kinds: dict[str, Any] = {
        "jsonl": JsonLines,
        "json": JsonArray,
        "parquet": Parquet,
        "huggingface": HuggingFace,
        "webdataset": WebDataset,
    }
    if format not in kinds:
        raise ConfigError(f"{path}: cannot tell what kind of records this is ({_HINT})")
    try:
        return kinds[format](path)
    except OSError as error:
        raise ConfigError(f"{path}: unreadable: {error}") from None


def _mapping(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise Rejected("record: not an object", f"found {type(data).__name__}")
    return data


def _row(table: pa.Table, i: int) -> dict[str, Any]:
    return {k: v for k, v in table.slice(i, 1).to_pylist()[0].items() if v is not None}
