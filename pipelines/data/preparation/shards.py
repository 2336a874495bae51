"""Shards of a preparation: written one at a time, each committed by its summary, so that a stopped run continues.

A shard holds the examples of a fixed range of records: `shard-00000.arrow` and `shard-00000.json`, its summary. Both appear
atomically and the summary last; a shard without one is made again. Nothing in them depends on which worker made them or when.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipelines.data import schema
from pipelines.data.builder import example_rng
from pipelines.data.preparation.checksums import checksums
from pipelines.data.records.fetching import Opened, fetched
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record, Records
from pipelines.files import write_text

_BATCH_BYTES = 64 << 20


class Builder(Protocol):
    """An `ExampleBuilder`, or one that isolates videos."""

    def example(self, record: Record, counts: collections.Counter[str]) -> dict[str, Any]:
        """What `build` takes; counts the fields that were not used; raises `Rejected`."""
        ...

    def build(self, example: dict[str, Any], rng: np.random.RandomState) -> dict[str, Any]:
        """The preprocessed example; raises `Rejected`."""
        ...


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    """`shard-00000.arrow` or `.json` of a folder."""
    return folder / f"shard-{shard:05d}{suffix}"


def write_shard(
    folder: Path, shard: int, rows: range, records: Records, builder: Builder, seed: int, pool: concurrent.futures.Executor | None = None
) -> dict[str, Any]:
    """Makes and commits one shard. With a pool of threads, remote images are fetched ahead.

    Returns:
        Its summary: rows_in, rows_out, rejected [[source, row, reason, detail], ...], truncated, fields_not_used {name: rows},
        tokens and crops of each example, bytes, checksums (of the file's blocks), seconds.
    """
    started = time.perf_counter()
    rejected: list[list[Any]] = []
    tokens: list[int] = []
    crops: list[int] = []
    truncated = 0
    rows_in: collections.Counter[str] = collections.Counter()
    fields: collections.Counter[str] = collections.Counter()

    def open_example(i: int) -> Opened:
        try:
            return builder.example(records[i], fields)
        except Rejected as reason:
            return reason

    def tables() -> Iterator[pa.Table]:
        nonlocal truncated
        pending: list[dict[str, Any]] = []
        where: list[tuple[str, int]] = []
        pending_bytes = 0
        opened = map(open_example, rows)
        for i, example in zip(rows, fetched(opened, pool) if pool else opened):
            source, row = records.where(i)
            rows_in[source] += 1
            try:
                if isinstance(example, Rejected):
                    raise example
                example = builder.build(example, example_rng(seed, 0, 0, i))
            except Rejected as reason:
                rejected.append([source, row, reason.reason, reason.detail])
                continue
            for count, values in zip(schema.size(example), (tokens, crops)):
                values.append(count)
            truncated += bool(example.get("metadata", {}).get("truncation"))
            pending.append(example)
            where.append((source, row))
            pending_bytes += sum(v.nbytes for v in example.values() if isinstance(v, np.ndarray))
            if pending_bytes > _BATCH_BYTES:
                yield schema.to_table(pending, *zip(*where))
                pending, where, pending_bytes = [], [], 0
        if pending:
            yield schema.to_table(pending, *zip(*where))

    path = shard_path(folder, shard, ".arrow")
    schema.write(path, tables())
    summary = {
        "shard": shard,
        "rows_in": dict(rows_in),
        "rows_out": len(tokens),
        "rejected": rejected,
        "truncated": truncated,
        "fields_not_used": dict(fields),
        "tokens": tokens,
        "crops": crops,
        "bytes": path.stat().st_size,
        "checksums": checksums(path),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_text(shard_path(folder, shard, ".json"), json.dumps(summary))
    return summary


def withdraw(folder: Path, shard: int) -> None:
    """Takes the commit of a shard back: the next start makes it again."""
    shard_path(folder, shard, ".json").unlink(missing_ok=True)


def read_summary(folder: Path, shard: int) -> dict[str, Any] | None:
    """Summary of a committed shard; None if it has yet to be made, or is missing, cut or damaged."""
    path, data = shard_path(folder, shard, ".json"), shard_path(folder, shard, ".arrow")
    if not (path.is_file() and data.is_file()):
        return None
    try:
        summary = json.loads(path.read_text())
    except ValueError:
        return None
    return summary if data.stat().st_size == summary["bytes"] and checksums(data) == summary["checksums"] else None
