"""The books of a preparation: every record is in a shard or in the list of rejected rows, with a reason."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data import schema
from pipelines.data.preparation.report import write_report
from pipelines.data.rejects import Rejects, TooManyRejected
from pipelines.files import write_table, write_text

DATASET, INDEX, REPORT, REJECTED = "dataset.json", "index.parquet", "report.json", "rejected.parquet"
STOPPED = "stopped.txt"
"""Left by a run that stopped because too many records were unusable."""
_ADVICE = {
    "media": "when the missing media are there (they are tried again)",
    "image": "with whole image files",
    "video": "with whole video files",
    "record": "with corrected records or a model that takes them, in an empty folder",
}
_LONGEST_DETAIL = 300
Summaries = Mapping[int, dict[str, Any]]


def first_details(summaries: Iterable[dict[str, Any]]) -> dict[str, str]:
    """For each reason where it occurs first and what was wrong there."""
    found: dict[str, str] = {}
    for summary in summaries:
        for source, row, reason, detail in summary["rejected"]:
            shown = detail if len(detail) <= _LONGEST_DETAIL else f"{detail[:_LONGEST_DETAIL]}..."
            found.setdefault(reason, f"{source}, row {row}" + (f": {shown}" if detail else ""))
    return found


def write_rejected(folder: Path, done: Summaries) -> None:
    """Writes `rejected.parquet`: source, row, reason, detail of every record that was not used so far."""
    rows = [row for k in sorted(done) for row in done[k]["rejected"]]
    kinds = {"source": pa.string(), "row": pa.int64(), "reason": pa.string(), "detail": pa.string()}
    table = pa.table({name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(kinds.items())})
    write_table(table, folder / REJECTED)


def stop(folder: Path, done: Summaries, error: TooManyRejected) -> TooManyRejected:
    """Closes the books of a run that stops, for now, because of its rejected records; the error says what was wrong and what to do."""
    write_rejected(folder, done)
    write_text(folder / STOPPED, str(error))
    details = first_details(done[k] for k in sorted(done))
    lines = [f"\n  {reason}, first in {detail}" for reason, detail in details.items()]
    ways = [advice for kind, advice in _ADVICE.items() if any(reason.startswith(kind) for reason in details)]
    return TooManyRejected(
        f"{error}.{''.join(lines)}\nAll rejected rows so far: {folder / REJECTED}. Start again {', '.join(ways)}"
        f"{', ' if ways else ''}or with a larger max_reject_rate."
    )


def close(
    folder: Path, done: Summaries, total: int, length: int | None, made_for: dict[str, Any], made: int, seconds: float, held_out: int
) -> dict[str, Any]:
    """Checks the books, then writes index, rejected rows and report.

    Args:
        done: summaries of all shards.
        total: records to be prepared.
        length: longest example in tokens.
        made_for: the model and its settings.
        made: records that took `seconds`; others were made before a stop.
        held_out: records that were not to be prepared.
    """
    rejects = Rejects(1.0)
    ordered = [done[k] for k in sorted(done)]
    for summary in ordered:
        rejects.add(summary["rows_in"], summary["rejected"])
    rows_in, rows_out = rejects.seen.total(), sum(s["rows_out"] for s in ordered)
    if rows_in != total or rows_in != rows_out + rejects.total:
        raise RuntimeError(f"{folder}: {total} records, but {rows_in} in = {rows_out} out + {rejects.total} rejected")
    write_rejected(folder, done)
    rejected = [row for s in ordered for row in s["rejected"]]
    tokens = [n for s in ordered for n in s["tokens"]]
    crops = [n for s in ordered for n in s["crops"]]
    index = {"shard": [s["shard"] for s in ordered for _ in s["tokens"]], "tokens": tokens, "crops": crops}
    write_table(pa.table({k: pa.array(v, pa.int64()) for k, v in index.items()}), folder / INDEX)
    report = {
        "rows_in": rows_in,
        "rows_held_out": held_out,
        "rows_out": rows_out,
        "rows_rejected": rejects.total,
        "rejected_by_reason": rejects.by_reason(),
        "first_details": first_details(ordered),
        "seconds": round(seconds, 2),
        "rows_per_second": round(made / max(seconds, 1e-9), 1),
        "sequence_length": length or max(tokens, default=0),
        "truncated": sum(s["truncated"] for s in ordered),
        "fields_not_used": dict(sum((collections.Counter(s["fields_not_used"]) for s in ordered), collections.Counter()).most_common()),
        "tokens": sum(tokens),
        "longest": max(tokens, default=0),
        "crops": sum(crops),
        "bytes": sum(s["bytes"] for s in ordered),
        "shards": len(ordered),
    }
    write_report(folder, report, tokens, crops, rejected)
    dataset = {
        "version": schema.VERSION,
        "rows": rows_out,
        "shards": len(ordered),
        "bytes": [s["bytes"] for s in ordered],
        "made_for": made_for,
    }
    write_text(folder / DATASET, json.dumps(dataset) + "\n")
    write_text(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report
