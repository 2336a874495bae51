"""The one Arrow schema of preprocessed examples, and the way there and back. Needs pyarrow and numpy, not ray.

Every array of the contract (docs/architecture.md) is a flat list column; arrays with more than one axis have a `<name>_shape`
column beside it, pixels are `large_binary`. All media columns are nullable, so that text, images and video share files.
The version is in the schema's metadata and is checked on reading.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

VERSION = 2

_INT, _FLOAT = pa.list_(pa.int64()), pa.list_(pa.float32())
# One axis: [S] (or [N_c] for HeMolmo's candidates).
FLAT: dict[str, pa.DataType] = {
    "input_ids": _INT,
    "labels": _INT,
    "loss_masks": _FLOAT,
    "position_ids": _INT,
    "subsegment_ids": _INT,
    "high_res_pos_ids": _INT,
    "high_res_features_weights": _FLOAT,
}
# Two axes, with a shape column.
SHAPED: dict[str, pa.DataType] = {
    "image_masks": _FLOAT,
    "pooled_patches_idx": _INT,
    "low_res_pooled_idx": _INT,
    "high_res_pooled_idx": _INT,
    "low_res_tokens_idx": _INT,
    "high_res_tokens_idx": _INT,
    "low_to_high": _FLOAT,
    "point_target_ids": _INT,
}
_REQUIRED = ("input_ids",)
_SHAPE = pa.list_(pa.int64())
_IMAGE_DTYPES = ("uint8", "float32")

SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        *(pa.field(name, kind, nullable=name not in _REQUIRED) for name, kind in FLAT.items()),
        *(field for name, kind in SHAPED.items() for field in (pa.field(name, kind), pa.field(f"{name}_shape", _SHAPE))),
        pa.field("images", pa.large_binary()),
        pa.field("images_shape", _SHAPE),
        pa.field("images_dtype", pa.string()),
        pa.field("metadata", pa.string()),
    ],
    metadata={"molmo.examples.version": str(VERSION)},
)


def to_table(examples: Sequence[dict[str, Any]], sources: Sequence[str], rows: Sequence[int]) -> pa.Table:
    """Preprocessed examples as a table.

    Args:
        examples: dictionaries of the contract; absent arrays become nulls.
        sources: file of each example.
        rows: row of each example in its file.

    Raises:
        ValueError: an array that the schema has no column for, or of a wrong type.
    """
    known = {"images", "metadata", *FLAT, *SHAPED}
    for source, row, example in zip(sources, rows, examples):
        if unknown := set(example) - known:
            raise ValueError(f"{source}, row {row}: the example schema (version {VERSION}) has no column for {sorted(unknown)}")
    columns: dict[str, pa.Array] = {"source": pa.array(sources, pa.string()), "row": pa.array(rows, pa.int64())}
    for name, kind in FLAT.items():
        columns[name] = _lists([e.get(name) for e in examples], kind)
    for name, kind in SHAPED.items():
        columns[name] = _lists([e.get(name) for e in examples], kind)
        columns[f"{name}_shape"] = _shapes([e.get(name) for e in examples])
    images = [e.get("images") for e in examples]
    for source, row, value in zip(sources, rows, images):
        if value is not None and str(value.dtype) not in _IMAGE_DTYPES:
            raise ValueError(f"{source}, row {row}: images are {value.dtype}, must be one of {_IMAGE_DTYPES}")
    columns["images"] = _binary(images)
    columns["images_shape"] = _shapes(images)
    columns["images_dtype"] = pa.array([None if v is None else str(v.dtype) for v in images], pa.string())
    columns["metadata"] = pa.array([None if e.get("metadata") is None else _json(e["metadata"]) for e in examples], pa.string())
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The examples of a table (arrays are read-only views on its memory); `metadata` also holds source and row."""
    batches = [table] if isinstance(table, pa.RecordBatch) else table.combine_chunks().to_batches()
    return [columns.row(i) for columns in map(Columns, batches) for i in range(columns.num_rows)]


class Columns:
    """Fast row access to a record batch: numpy views on the columns, made once."""

    def __init__(self, batch: pa.RecordBatch):
        check_version(batch.schema)
        self.num_rows = batch.num_rows
        self._lists = {name: _view(batch.column(name)) for name in (*FLAT, *SHAPED)}
        self._shape_of = {name: _view(batch.column(f"{name}_shape")) for name in (*SHAPED, "images")}
        self._images = views(batch.column("images"))
        self._dtypes = batch.column("images_dtype")
        self._metadata, self._source, self._row = (batch.column(n) for n in ("metadata", "source", "row"))

    def row(self, i: int) -> dict[str, Any]:
        """Example `i` as the contract's dictionary; null columns are left out."""
        example: dict[str, Any] = {}
        for name, view in self._lists.items():
            value = _take(view, i)
            if value is None:
                continue
            example[name] = value.reshape(_take(self._shape_of[name], i)) if name in self._shape_of else value
        if (shape := _take(self._shape_of["images"], i)) is not None:
            example["images"] = np.frombuffer(self._images[i], dtype=self._dtypes[i].as_py()).reshape(shape)
        text = self._metadata[i].as_py()
        example["metadata"] = {"source": self._source[i].as_py(), "row": self._row[i].as_py(), **(json.loads(text) if text else {})}
        return example


def write(path: Path, tables: Iterable[pa.Table]) -> None:
    """Writes an Arrow IPC file, one record batch a table; the file appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for table in tables:
            for batch in table.combine_chunks().to_batches():
                writer.write_batch(batch)
    temporary.replace(path)


def size(example: Mapping[str, Any]) -> tuple[int, int]:
    """(tokens, crops) of a preprocessed example."""
    images = example.get("images")
    return len(example["input_ids"]), 0 if images is None else len(images)


def views(column: pa.LargeBinaryArray) -> list[memoryview]:
    """The bytes of each row, read-only and not copied (pyarrow's scalars are copies); none for nulls."""
    _, offsets, data = column.buffers()
    whole = memoryview(data or b"").toreadonly()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1].tolist()
    return [whole[start:end] for start, end in itertools.pairwise(ends)]


def check_version(schema: pa.Schema) -> None:
    """Raises ValueError if `schema` is not that of examples of this version."""
    found = (schema.metadata or {}).get(b"molmo.examples.version")
    if found is None or int(found) != VERSION:
        version = "no example" if found is None else f"version {int(found)} of the example"
        raise ValueError(f"this Arrow data has {version} schema; version {VERSION} is needed: run `python -m jobs.prepare` again")


def _lists(values: list[np.ndarray | None], kind: pa.ListType) -> pa.ListArray:
    dtype = kind.value_type.to_pandas_dtype()
    flat = [np.empty(0, dtype) if v is None else np.ascontiguousarray(v, dtype).reshape(-1) for v in values]
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(v) for v in flat], out=offsets[1:])
    mask = pa.array([v is None for v in values], pa.bool_())
    data = np.concatenate(flat) if flat else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(data, kind.value_type), type=kind, mask=mask)


def _binary(values: list[np.ndarray | None]) -> pa.LargeBinaryArray:
    """The arrays' bytes. Made from buffers: pyarrow (25) never releases the memoryviews that `pa.array` is given, nor their arrays."""
    flat = [np.empty(0, np.uint8) if v is None else np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in values]
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(v) for v in flat], out=offsets[1:])
    data = np.concatenate(flat) if flat else np.empty(0, np.uint8)
    valid = pa.array([v is not None for v in values], pa.bool_()).buffers()[1]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(values), [valid, pa.py_buffer(offsets), pa.py_buffer(data)])


def _shapes(values: list[np.ndarray | None]) -> pa.ListArray:
    return pa.array([None if v is None else list(v.shape) for v in values], _SHAPE)


def _view(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(offsets, values, validity) of a list column."""
    valid = None if column.null_count == 0 else column.is_valid().to_numpy(zero_copy_only=False)
    return column.offsets.to_numpy(), column.values.to_numpy(), valid


def _take(view: tuple[np.ndarray, np.ndarray, np.ndarray | None], i: int) -> np.ndarray | None:
    offsets, values, valid = view
    return None if valid is not None and not valid[i] else values[offsets[i] : offsets[i + 1]]


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
