"""Reading a prepared dataset: memory-mapped, any example by number, nothing loaded before it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from molmo_core.config import ConfigError
from pipelines.data import schema
from pipelines.data.config import DataConfig, DatasetConfig
from pipelines.data.preparation.books import DATASET, INDEX
from pipelines.data.preparation.checksums import BLOCK, BlockCheck
from pipelines.data.preparation.claim import STATE
from pipelines.data.preparation.shards import shard_path


def is_prepared(path: str) -> bool:
    """Whether `path` is a folder that `jobs.prepare` writes (complete or not)."""
    return "://" not in path and any((Path(path) / name).is_file() for name in (DATASET, STATE))


def is_streamed(data: DataConfig) -> bool:
    """Whether any dataset of a run is records, which actors decode while it trains."""
    return not all(reads_prepared(config) for group in data.all_groups().values() for config in group.datasets.values())


def reads_prepared(config: DatasetConfig) -> bool:
    """Whether a dataset of a run is a prepared one."""
    return config.format == "prepared" or (config.format == "auto" and is_prepared(config.path))


class PreparedDataset:
    """The examples of a folder written by `jobs.prepare`.

    Attributes:
        tokens, crops: int64 [n], length and number of crops or frames of each example.
        made_for: the `model` and its `settings` for which it was prepared (`example_settings`).

    Raises:
        ConfigError: no such dataset, an unfinished one, one of another schema version, or shards that are missing or cut. A shard that is
            damaged otherwise is found when an example of it is first read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / DATASET).is_file():
            state = "is not finished: run `python -m jobs.prepare` again" if is_prepared(str(folder)) else "holds no prepared dataset"
            raise ConfigError(f"{self.folder}: {state}")
        info = json.loads((self.folder / DATASET).read_text())
        if info["version"] != schema.VERSION:
            raise ConfigError(f"{self.folder}: schema version {info['version']}, this code reads {schema.VERSION}; prepare it again")
        self.made_for: dict[str, Any] | None = info.get("made_for")
        for number, size in enumerate(info.get("bytes", ())):
            path = shard_path(self.folder, number, ".arrow")
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise damaged(path, "missing" if found is None else f"{found:,} bytes of {size:,}")
        index = pq.read_table(self.folder / INDEX)
        self.tokens = index.column("tokens").to_numpy()
        self.crops = index.column("crops").to_numpy()
        shards = index.column("shard").to_numpy()
        self._first = np.searchsorted(shards, np.arange(info["shards"] + 1))
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Example `i`: read-only views on the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        if number not in self._shards:
            self._shards[number] = _Shard(shard_path(self.folder, number, ".arrow"))
        return self._shards[number][i - int(self._first[number])]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}


def damaged(path: Path, what: str) -> ConfigError:
    """A shard that is not what was written."""
    return ConfigError(f"{path}: damaged ({what}). Run `python -m jobs.prepare` again with the same settings: it makes this shard anew")


def _footer(view: memoryview, verify: Callable[[int, int], None]) -> tuple[int, int]:
    """The bytes of an Arrow file's footer, which may lie in several blocks: the file ends with its length (int32) and `ARROW1`."""
    end = max(0, len(view) - 10)
    verify(end, len(view))
    length = int.from_bytes(view[end : end + 4], "little", signed=True)
    return max(0, end - max(0, length)), len(view)


class _Shard:
    """A memory-mapped Arrow file; record batches are mapped, and their bytes checked, when first used."""

    def __init__(self, path: Path):
        self._path = path
        self._whole = pa.memory_map(str(path)).read_buffer()
        view = memoryview(self._whole)
        try:
            expected = json.loads(path.with_suffix(".json").read_text()).get("checksums")
        except (OSError, ValueError):
            raise damaged(path, f"{path.with_suffix('.json').name}, which commits it, is missing or damaged") from None
        self._check = BlockCheck(view, expected) if expected is not None else None
        self._verify(0, 1)  # the schema
        self._verify(*_footer(view, self._verify))  # where its batches are
        try:
            self._file = pa.ipc.open_file(pa.BufferReader(self._whole))
        except (OSError, pa.ArrowInvalid) as error:  # of a shard without checksums
            raise damaged(path, str(error)) from error
        self._batches: list[pa.RecordBatch] = []
        self._columns: dict[int, schema.Columns] = {}
        self._bounds, self._ends = [0], [0]  # rows before each batch, bytes up to its end

    def __getitem__(self, i: int) -> dict[str, Any]:
        while self._bounds[-1] <= i:
            try:
                batch = self._file.get_batch(len(self._batches))
            except (OSError, pa.ArrowInvalid) as error:
                raise damaged(self._path, str(error)) from error
            buffers = [b for column in batch.columns for b in column.buffers() if b is not None and b.size]
            self._batches.append(batch)
            self._bounds.append(self._bounds[-1] + batch.num_rows)
            self._ends.append(max((b.address + b.size - self._whole.address for b in buffers), default=self._ends[-1]))
        number = int(np.searchsorted(self._bounds, i, side="right")) - 1
        if number not in self._columns:
            self._verify(self._ends[number], self._ends[number + 1])
            self._columns[number] = schema.Columns(self._batches[number])
        return self._columns[number].row(i - self._bounds[number])

    def _verify(self, start: int, stop: int) -> None:
        if self._check is not None and (block := self._check.damaged(start, stop)) is not None:
            raise damaged(self._path, f"the bytes from {block * BLOCK:,} on are not those that were written")
