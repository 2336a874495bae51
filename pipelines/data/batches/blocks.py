"""The Arrow table in which a decode actor hands batches to the rank that trains on them: its columns, writing and reading it.

A block is a table of one row, because Ray Data cuts blocks between rows and each block, and each column of it, costs CPU time in the
actor and again in the rank. It holds some *parts*: rows of the batch of one step, collated. All their arrays are one piece of memory;
`data` is that piece, four list columns say what is where in it, and `parts` what became of the examples:

| column | type | holds |
|---|---|---|
| `part` | list<int32> | for each array: the part that it belongs to, from 0 |
| `name` | list<string> | for each array: its key in the batch |
| `dtype` | list<string> | for each array: numpy's name of its type (uint8, int64, float32, ...) |
| `shape` | list<list<int64>> | for each array: its axes, the first is that of the rows |
| `start` | list<int64> | for each array: its first byte in `data`, a multiple of 64; rows are stored one after the other (C order) |
| `data` | large_binary | the bytes of all arrays |
| `parts` | list<string> | for each part: JSON {"tried": {source: examples}, "rejected": [[source, row, reason, detail]], "states": ...} |

`states` are those of the rank's streams after the step, {stream: [integers]}, or null in a part that does not end its step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.data import schema
from pipelines.data.batches.packs import Reject, States

SCHEMA = pa.schema(
    {
        "part": pa.list_(pa.int32()),
        "name": pa.list_(pa.string()),
        "dtype": pa.list_(pa.string()),
        "shape": pa.list_(pa.list_(pa.int64())),
        "start": pa.list_(pa.int64()),
        "data": pa.large_binary(),
        "parts": pa.list_(pa.string()),
    }
)
_ALIGNED = 64


class Part(NamedTuple):
    """Some rows of the batch of a step."""

    arrays: dict[str, np.ndarray]
    tried: Mapping[str, int]
    """Examples of each source that the rows were to be made of."""
    rejected: Sequence[Reject]
    """Those that could not be used."""
    states: States | None
    """Of the rank's streams after the step, if it ends with this part."""


class BlockWriter:
    """Makes blocks, in memory that is used again: fresh pages cost as much as the copy that is made into them.

    There are two pieces of memory that take turns: a table and its arrays stay valid until the table after the next one is begun.
    """

    def __init__(self) -> None:
        self._memory = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._used = 0
        self._parts: list[Part] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """As `numpy.empty`: an array of this block."""
        start, self._used = self._used, _after(self._used + math.prod(shape) * np.dtype(dtype).itemsize)
        if self._used > len(self._memory[0]):
            return np.empty(shape, dtype)  # `table` makes room
        return np.ndarray(shape, dtype, self._memory[0].data, start)

    def add(self, part: Part) -> None:
        """Adds a part, whose arrays `empty` has made."""
        self._parts.append(part)

    def table(self) -> pa.Table:
        """What was added, as a table; begins the next block."""
        memory, arrays = self._memory[0], [array for part in self._parts for array in part.arrays.values()]
        starts = [_address(array) - _address(memory) for array in arrays]
        if any(not 0 <= start <= len(memory) - array.nbytes for start, array in zip(starts, arrays)):
            memory = np.empty(self._used, np.uint8)
            end, starts = 0, []
            for array in arrays:
                starts.append(end)
                np.ndarray(array.shape, array.dtype, memory.data, end)[...] = array
                end = _after(end + array.nbytes)
            self._memory[0] = memory
        ends = np.array([0, self._used])
        data = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(memory[: self._used])])
        columns = {
            "part": [number for number, part in enumerate(self._parts) for _ in part.arrays],
            "name": [name for part in self._parts for name in part.arrays],
            "dtype": [str(array.dtype) for array in arrays],
            "shape": [array.shape for array in arrays],
            "start": starts,
            "parts": [json.dumps({"tried": p.tried, "rejected": p.rejected, "states": p.states}) for p in self._parts],
        }
        made = {name: pa.array([values], SCHEMA.field(name).type) for name, values in columns.items()} | {"data": data}
        self._memory.reverse()
        self._parts, self._used = [], 0
        return pa.table(made, SCHEMA)


def read(block: pa.Table) -> Iterator[Part]:
    """The parts of a block, or of several after another; arrays are read-only views of its memory."""
    for batch in block.to_batches():
        for row, data in zip(batch.drop_columns(["data"]).to_pylist(), schema.views(batch.column("data"))):
            arrays: list[dict[str, np.ndarray]] = [{} for _ in row["parts"]]
            for part, name, dtype, shape, start in zip(*(row[key] for key in ("part", "name", "dtype", "shape", "start"))):
                arrays[part][name] = np.ndarray(shape, dtype, data, start)
            for part, text in zip(arrays, row["parts"]):
                fields = json.loads(text)
                states = fields["states"] and {int(stream): state for stream, state in fields["states"].items()}
                yield Part(part, fields["tried"], fields["rejected"], states)


def _after(end: int) -> int:
    return -(-end // _ALIGNED) * _ALIGNED


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
