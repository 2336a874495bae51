"""What an evaluation has so far: one Parquet file for each shard (a fixed range of records), which is whole whenever it is there.

Nothing in a shard depends on which worker made it or when, so a stopped evaluation continues, and the report is made from the files.
A row is a question with its answer and score, or a record that could not be used and why.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from molmo_core.config import ConfigError
from pipelines.files import write_bytes, write_text

FOLDER, STATE = "predictions", "evaluation.json"
VERSION = 1
"""Of the schema."""
POINTS = pa.list_(pa.struct([("x", pa.float32()), ("y", pa.float32())]))
"""Shares of the image's width and height."""
SCHEMA = pa.schema(
    [
        ("record", pa.int64()),  # its number among those evaluated
        ("number", pa.int32()),  # of the question in its record; null: the record was rejected
        ("source", pa.string()),  # file
        ("row", pa.int64()),  # in the file
        ("type", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("metric", pa.string()),
        ("prediction", pa.string()),
        ("score", pa.float64()),  # the metric's main one
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("true_points", POINTS),
        ("answer_points", POINTS),
        ("rejected", pa.string()),
        ("detail", pa.string()),
    ]
)


def encode(rows: Sequence[dict[str, Any]]) -> bytes:
    """A shard's Parquet file, with checksums."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), buffer, write_page_checksum=True)
    return buffer.getvalue()


def decode(file: bytes | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard's rows; raises OSError, ValueError or an ArrowException if the file is damaged or not there."""
    source = pa.BufferReader(file) if isinstance(file, bytes) else file
    table = pq.read_table(source, page_checksum_verification=True, partitioning=None)
    if not table.schema.equals(SCHEMA):  # the schema has no checksum
        raise ValueError(f"schema is {table.schema}")
    return table.select(list(columns)) if columns else table


class Results:
    """The results in a folder.

    Args:
        folder: of the evaluation.
        records: how many are evaluated.
        shard_records: records of a shard.
    """

    def __init__(self, folder: Path, records: int, shard_records: int):
        self.folder, self.records, self.shard_records = folder / FOLDER, records, shard_records

    @classmethod
    def open(cls, folder: Path) -> Results:
        """Those that `claim` noted in a folder. Raises ConfigError if there are none."""
        path = folder / STATE
        if not path.is_file():
            raise ConfigError(f"{folder}: no evaluation there; evaluate first")
        state = json.loads(path.read_text(encoding="utf-8"))
        return cls(folder, state["total"], state["settings"]["shard_records"])

    @property
    def shards(self) -> range:
        """Numbers of all shards."""
        return range(-(-self.records // self.shard_records))

    def records_of(self, shard: int) -> range:
        """Numbers of the records of a shard."""
        return range(shard * self.shard_records, min(self.records, (shard + 1) * self.shard_records))

    def commit(self, shard: int, file: bytes) -> None:
        """Puts a shard's file in its place, whole."""
        self.folder.mkdir(exist_ok=True)
        write_bytes(self._path(shard), file)

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """A shard that was committed; None if it has yet to be made, or its file is damaged."""
        try:
            return decode(self._path(shard), columns)
        except (pa.ArrowException, OSError, ValueError):  # of a footer, a page's checksum, a name that is no text
            return None

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All shards in order, one at a time.

        Raises:
            ConfigError: one is missing or damaged.
        """
        for shard in self.shards:
            table = self.read(shard, columns)
            if table is None:
                raise ConfigError(f"{self._path(shard)}: missing or damaged; run the same evaluation again to make it anew")
            yield table

    def rows(self, records: Sequence[int], numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of questions, given by record and number in it, in this order; reads only their shards."""
        wanted = list(zip(records, numbers))
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for shard in sorted({record // self.shard_records for record in records}):
            table = self.read(shard)
            assert table is not None
            keys = zip(table.column("record").to_pylist(), table.column("number").to_pylist())
            for i, key in enumerate(keys):
                if key in wanted:
                    found[key] = table.slice(i, 1).to_pylist()[0]
        return [found[key] for key in wanted]

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.parquet"


def claim(folder: Path, settings: dict[str, Any], model: Any, records: Any, total: int) -> Results:
    """Notes whose results are in a folder, so that no other evaluation continues there.

    Args:
        folder: of the evaluation.
        settings: what decides answers and scores; `shard_records` is one of them.
        model, records: what tells another model and changed records.
        total: records that are evaluated.

    Returns:
        What is there, or nothing yet.

    Raises:
        ConfigError: it holds results of another evaluation.
    """
    state = {"settings": settings, "model": model, "records": records, "total": total}
    text = json.dumps([VERSION, state], sort_keys=True)
    state["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / STATE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if found is not None and found["fingerprint"] != state["fingerprint"] and any((folder / FOLDER).glob("*.parquet")):
        old = found["settings"]
        changed = [key for key in {**settings, **old} if old.get(key) != settings.get(key)]
        changed += [what for what in ("model", "records") if found[what] != json.loads(json.dumps(state[what]))]
        raise ConfigError(
            f"{folder}: holds another evaluation ({', '.join(changed) or 'the version'} changed); choose another output or delete it"
        )
    write_text(path, json.dumps(state, indent=2, ensure_ascii=False) + "\n")
    return Results(folder, total, settings["shard_records"])
