"""Shards of a preparation: written one at a time, each committed by its summary, so that a stopped run continues.

A shard holds the examples of a fixed range of records: `shard-00000.arrow` and `shard-00000.json`, its summary. Both appear
atomically and the summary last; a shard without one is made again. Nothing in them depends on which worker made them or when.
"""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data import schema
from pipelines.data.builder import example_rng
from pipelines.data.sources import Records, Rejected

_BATCH_BYTES = 64 << 20


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    """`shard-00000.arrow` or `.json` of a folder."""
    return folder / f"shard-{shard:05d}{suffix}"


def write_shard(
    folder: Path, shard: int, rows: range, records: Records, builder: Callable[..., dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Makes and commits one shard.

    Returns:
        Its summary: rows_in, rows_out, rejected [[source, row, reason, detail], ...], truncated, tokens and crops of each example,
        bytes, seconds.
    """
    started = time.perf_counter()
    rejected: list[list[Any]] = []
    tokens: list[int] = []
    crops: list[int] = []
    truncated = 0
    rows_in: collections.Counter[str] = collections.Counter()

    def tables() -> Iterator[pa.Table]:
        nonlocal truncated
        pending: list[dict[str, Any]] = []
        where: list[tuple[str, int]] = []
        pending_bytes = 0
        for i in rows:
            source, row = records.where(i)
            rows_in[source] += 1
            try:
                example = builder(records[i], example_rng(seed, 0, 0, i))
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
                yield schema.encode(pending, *zip(*where))
                pending, where, pending_bytes = [], [], 0
        if pending:
            yield schema.encode(pending, *zip(*where))

    path = shard_path(folder, shard, ".arrow")
    schema.write(path, tables())
    summary = {
        "shard": shard,
        "rows_in": dict(rows_in),
        "rows_out": len(tokens),
        "rejected": rejected,
        "truncated": truncated,
        "tokens": tokens,
        "crops": crops,
        "bytes": path.stat().st_size,
        "seconds": round(time.perf_counter() - started, 3),
    }
    final = shard_path(folder, shard, ".json")
    temporary = final.with_name(f".{final.name}.tmp")
    temporary.write_text(json.dumps(summary, ensure_ascii=False))
    temporary.replace(final)
    return summary


def read_summary(folder: Path, shard: int) -> dict[str, Any] | None:
    """Summary of a committed shard, None if it has yet to be made."""
    path = shard_path(folder, shard, ".json")
    return json.loads(path.read_text()) if path.is_file() and shard_path(folder, shard, ".arrow").is_file() else None
