"""The report of a preparation for people: one page with numbers and pictures, nothing to install to look at it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molmo_core.preprocessing.packing import Packer
from pipelines.data.config import PackingConfig
from pipelines.data.preparation.charts import bars, histogram

PAGE = "report.html"
_PACKED_EXAMPLES = 2000
_FIELDS = 20
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; background: #fff; }
h1 { font-size: 1.4rem; margin-bottom: .2rem }
.sub { color: #5b6675; margin-top: 0 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: .6rem; }
dl div { background: #f3f5f8; border-radius: 8px; padding: .6rem .8rem }
dt { color: #5b6675; font-size: .85rem } dd { margin: 0; font-size: 1.25rem }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem } svg { max-width: 100%; height: auto }
.bar { fill: #3b6ea5 } .axis { stroke: #b9c2cd }
.label { font-size: 12px; fill: #5b6675 } .title { font-size: 14px; font-weight: 600; fill: #1c2430 }
table { border-collapse: collapse; font-size: .9rem } td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top }
"""


def write_report(
    folder: Path, report: dict[str, Any], tokens: Sequence[int], crops: Sequence[int], rejected: Sequence[Sequence[Any]]
) -> None:
    """Writes `report.html` into a prepared dataset.

    Args:
        folder: of the dataset.
        report: what `report.json` holds.
        tokens, crops: of every example.
        rejected: rows of source, row, reason, detail.
    """
    length = report["sequence_length"]
    used = occupancy(tokens, crops, length)
    numbers = {
        "records in": f"{report['rows_in']:,}",
        "held out": f"{report['rows_held_out']:,}",
        "examples out": f"{report['rows_out']:,}",
        "rejected": f"{report['rows_rejected']:,}",
        "truncated to fit": f"{report['truncated']:,}",
        "tokens": f"{report['tokens']:,}",
        "crops and frames": f"{report['crops']:,}",
        "size": f"{report['bytes'] / 1e6:,.1f} MB",
        "shards": f"{report['shards']:,}",
        "time": f"{report['seconds']:,.1f} s",
        "speed": f"{report['rows_per_second']:,.1f} records/s",
    }
    if used:
        numbers["tokens used, packed"] = f"{100 * np.mean(used):.1f} %"
        numbers["one a sequence"] = f"{100 * np.mean(tokens) / length:.1f} %"
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers.items())
    charts = [
        histogram(tokens, "Length of the examples", "tokens"),
        histogram(crops, "Crops and frames", "an example"),
        histogram([100 * u for u in used], f"Packed to {length:,} tokens", "% of a sequence used"),
    ]
    if report["rejected_by_reason"]:
        charts.append(bars(report["rejected_by_reason"], "Rejected records"))
    if report["fields_not_used"]:
        charts.append(bars(dict(list(report["fields_not_used"].items())[:_FIELDS]), "Fields not used, records"))
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rejected[:50])
    listed = f"<h2>First rejected records</h2><table><tr><th>source<th>row<th>reason<th>detail</tr>{rows}</table>" if rows else ""
    name = html.escape(str(folder))
    (folder / PAGE).write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style><h1>Prepared dataset</h1>'
        f'<p class="sub">{name}</p><dl>{items}</dl><div class="charts">{"".join(charts)}</div>{listed}</html>\n',
        encoding="utf-8",
    )


def occupancy(tokens: Sequence[int], crops: Sequence[int], length: int) -> list[float]:
    """Share of the tokens of a sequence that each pack uses, on a shuffled sample, with the default packing."""
    order = np.random.RandomState(0).permutation(len(tokens))[:_PACKED_EXAMPLES]
    defaults = PackingConfig()
    packer: Packer[int] = Packer(length, max(defaults.max_crops, max(crops, default=0)), buffer_size=defaults.buffer_size)
    packs = [pack for i in order if (pack := packer.add(int(i), tokens[i], crops[i])) is not None]
    return [sum(tokens[i] for i in pack) / length for pack in packs]
