"""Reading a prepared dataset: memory-mapped, any example by number, nothing loaded before it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from molmo_core.config import ConfigError
from pipelines.data import schema
from pipelines.data.config import DataConfig, DatasetConfig
from pipelines.data.preparation.shards import shard_path

DATASET, INDEX = "dataset.json", "index.parquet"


def is_prepared(path: str) -> bool:
    """Whether `path` is a folder that `jobs.prepare` writes (complete or not)."""
    return "://" not in path and any((Path(path) / name).is_file() for name in (DATASET, "prepare.json"))


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

    Raises:
        ConfigError: no such dataset, an unfinished one, or one of another schema version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / DATASET).is_file():
            state = "is not finished: run `python -m jobs.prepare` again" if is_prepared(str(folder)) else "holds no prepared dataset"
            raise ConfigError(f"{self.folder}: {state}")
        info = json.loads((self.folder / DATASET).read_text())
        if info["version"] != schema.VERSION:
            raise ConfigError(f"{self.folder}: schema version {info['version']}, this code reads {schema.VERSION}; prepare it again")
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


class _Shard:
    """A memory-mapped Arrow file; record batches are mapped when first used."""

    def __init__(self, path: Path):
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._columns: list[schema.Columns] = []
        self._bounds = [0]

    def __getitem__(self, i: int) -> dict[str, Any]:
        while self._bounds[-1] <= i:
            batch = schema.Columns(self._file.get_batch(len(self._columns)))
            self._columns.append(batch)
            self._bounds.append(self._bounds[-1] + batch.num_rows)
        number = int(np.searchsorted(self._bounds, i, side="right")) - 1
        return self._columns[number].row(i - self._bounds[number])
