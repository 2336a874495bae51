"""Records as rows of Arrow tables: Parquet files, and Hugging Face datasets on a local disk."""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from molmo_core.config import ConfigError
from pipelines.data.records.record_file import RecordFile, version
from pipelines.data.rejects import Rejected

PLACEHOLDER = b"-"
"""Stands for the bytes of a medium where only the text of a record is read."""


class Recent:
    """The tables that were used last, up to a number of bytes (one at least)."""

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._tables: collections.OrderedDict[Hashable, pa.Table] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], pa.Table]) -> pa.Table:
        """The table of a key, made if it is not there."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = make()
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._bytes += table.nbytes
            while self._bytes > self._limit and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
        return table


# Of all files together: a folder of a thousand files must not keep a row group of each.
_groups, _texts = Recent(256 << 20), Recent(256 << 20)


class Parquet(RecordFile):
    """Columns are the record's fields; media columns hold paths, URLs, bytes or {bytes, path}."""

    def __init__(self, path: str):
        super().__init__(path)
        file = self._parquet()
        self._bounds = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
        columns = [file.schema.column(c) for c in range(len(file.schema.names))]
        self._media = {c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type == c.converted_type == "NONE"}
        self._leaves = [c.path for c in columns]

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, i: int) -> dict[str, Any]:
        group, row = self._find(i)
        return _row(_groups.get((self.path, self.version, group), lambda: self._group(group)), row)

    def text(self, i: int) -> dict[str, Any]:
        """Record `i` with a `PLACEHOLDER` for every value of bytes; most columns of these are not read for it."""
        group, row = self._find(i)
        return _row(_texts.get((self.path, self.version, group), lambda: self._text_group(group)), row)

    def _find(self, i: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._bounds, i, side="right")) - 1
        return group, i - int(self._bounds[group])

    def _parquet(self) -> pq.ParquetFile:
        file = self.__dict__.get("_open_parquet")
        if file is None:
            try:
                file = self._open_parquet = pq.ParquetFile(self._handle())
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(f"{self.path}: not a Parquet file: {error}") from None
        return file

    def _group(self, group: int, leaves: list[str] | None = None) -> pa.Table:
        try:
            return self._parquet().read_row_group(group, leaves)
        except (pa.ArrowException, OSError) as error:
            raise Rejected("record: unreadable row group", str(error)) from None

    def _text_group(self, group: int) -> pa.Table:
        full = self._parquet().schema_arrow
        left_out = {leaf for leaf in self._media if self._presence_is_known(leaf, group)}
        if left_out == set(self._leaves):
            return self._group(group)  # nothing but media
        table = self._group(group, [leaf for leaf in self._leaves if leaf not in left_out])
        try:
            for name in full.names:
                if name not in table.column_names:
                    table = table.append_column(name, pa.array([PLACEHOLDER] * len(table)))
                elif any(leaf == name or leaf.startswith(f"{name}.") for leaf in self._media):
                    kind = full.field(name).type
                    values = pa.array([_light(v, kind) for v in table.column(name).to_pylist()], kind)
                    table = table.set_column(table.column_names.index(name), name, values)
        except (pa.ArrowException, ValueError, TypeError):
            return self._group(group)  # a value or a type that does not bear this (a path that is not UTF-8): as it is
        return table

    def _presence_is_known(self, leaf: str, group: int) -> bool:
        """Whether it is known without reading this column which rows have it: all, or those that have the field beside it."""
        parent = leaf.rpartition(".")[0]
        if parent.endswith(".key_value"):
            return False  # half a map cannot be read
        if leaf not in self._parquet().schema_arrow.names:
            return any(other.rpartition(".")[0] == parent for other in self._leaves if other not in self._media)
        statistics = self._parquet().metadata.row_group(group).column(self._leaves.index(leaf)).statistics
        return statistics is not None and statistics.has_null_count and statistics.null_count == 0


class HuggingFace(RecordFile):
    """A dataset (one split) written by `datasets.Dataset.save_to_disk`, memory-mapped."""

    def __init__(self, path: str):
        self.path = path
        state = json.loads((Path(path) / "state.json").read_text())
        self._files = [str(Path(path) / entry["filename"]) for entry in state["_data_files"]]
        versions = [version(f) for f in self._files]
        self.version = (sum(int(size or 0) for size, _ in versions), sum(int(changed or 0) for _, changed in versions))
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


def _row(table: pa.Table, i: int) -> dict[str, Any]:
    try:
        row = table.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise Rejected("record: not UTF-8", str(error)) from None
    except (pa.ArrowException, ValueError, OverflowError) as error:  # a date of the year 10,000
        raise Rejected("record: unreadable value", str(error)) from None
    return {k: v for k, v in row.items() if v is not None}


def _light(value: Any, kind: pa.DataType) -> Any:
    """A value with placeholders for the bytes in it, also for those that were not read."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {f.name: _light(value.get(f.name, PLACEHOLDER), f.type) for f in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_light(v, kind.value_type) for v in value]
    return PLACEHOLDER if isinstance(value, bytes) else value
