"""The report of an evaluation for people: one page with figures, confusions and examples, complete in itself."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pipelines.evaluation.examples import Example
from pipelines.files import write_text

RIGHT = 0.5
"""An answer of at least this score is shown as right."""
SHADE = 0.65
"""The darkest, under text that has to be read."""
_ANSWERS = 5
_FILTER = """
const choice = document.querySelector("select");
choice.addEventListener("change", () => {
  for (const card of document.querySelectorAll(".card")) card.hidden = choice.value !== "" && card.dataset.type !== choice.value;
});
"""
_TRUTH = '<circle class="halo" r="{r}" stroke-width="5"/><circle class="truth" r="{r}" stroke-width="2.5"/>'
_ANSWER = '<path class="halo" d="{d}" stroke-width="5"/><path class="answer" d="{d}" stroke-width="2.5"/>'
_RING, _CROSS = _TRUTH.format(r=9), _ANSWER.format(d="M-7-7 7 7M-7 7 7-7")


def write_page(
    path: Path, figures: dict[str, Any], confusions: dict[str, dict[str, Any]], worst: Sequence[Example], drawn: Sequence[Example]
) -> None:
    """Writes the page.

    Args:
        path: of the file.
        figures: `report.json`.
        confusions: as `Confusion.tables` gives them.
        worst, drawn: examples with the lowest scores, and a random sample.
    """
    style = importlib.resources.files("pipelines.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    sections = [_figures(figures)]
    if confusions:
        tables = "".join(_confusion(kind, table) for kind, table in confusions.items())
        sections.append(
            "<h2>Confusion</h2><p>Rows: the true answer. Columns: what the model said. Shades are shares of a row.</p>"
            f'<div class="confusions">{tables}</div>'
        )
    sections.append(_controls([*worst, *drawn]))
    for title, shown in (("Worst answers", worst), ("Random answers", drawn)):
        cards = "".join(map(_card, shown))
        sections.append(f'<h2>{title}</h2><p>{len(shown)} of {_asked(figures):,} questions</p><div class="cards">{cards}</div>')
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Evaluation of {escape(figures['model'])}</title><style>{style}</style></head>\n"
        f"<body>{''.join(sections)}<script>{_FILTER}</script></body></html>\n",
    )


def _asked(figures: dict[str, Any]) -> int:
    return sum(found["questions"] for found in figures["types"].values())


def _figures(figures: dict[str, Any]) -> str:
    rejected = "".join(f"<br>{number:,} × {escape(reason)}" for reason, number in figures["reasons"].items())
    told = f"{figures['rejected']:,} records could not be used{rejected}" if figures["rejected"] else "every record could be used"
    shown = ""
    if figures["questions"]:
        apart = any(found["metric"] == "pointing" for found in figures["types"].values())
        overall = {"questions": figures["questions"], "metric": "mean", "scores": {}, "score": figures["overall"]}
        shown = _row("all but pointing" if apart else "all", {**overall, "low": figures["low"], "high": figures["high"]}, "all")
    shown += "".join(_row(kind, found) for kind, found in figures["types"].items())
    return (
        f"<h1>Evaluation</h1><p><code>{escape(figures['model'])}</code> on <code>{escape(figures['set'])}</code></p>"
        f"<p>{figures['records']:,} records, {_asked(figures):,} questions; {told}</p>"
        '<h2>Scores</h2><div class="scroll"><table class="figures"><thead><tr><th>questions<th class="number">number'
        f'<th class="number">score<th>95 % interval<th><th>metric</tr></thead><tbody>{shown}</tbody></table></div>'
    )


def _row(name: str, found: dict[str, Any], kind: str = "") -> str:
    score, low, high = (100 * found[key] for key in ("score", "low", "high"))
    bar = f'<span class="bar"><i style="width:{score:.2f}%"></i><b style="left:{low:.2f}%;width:{max(high - low, 0.5):.2f}%"></b></span>'
    others = "".join(f" · {escape(key)} {100 * value['score']:.1f} %" for key, value in list(found["scores"].items())[1:])
    return (
        f'<tr class="{kind}"><td>{escape(name)}<td class="number">{found["questions"]:,}<td class="number">{score:.1f} %'
        f"<td>{low:.1f} – {high:.1f}<td>{bar}<td>{escape(found['metric'])}<small>{others}</small></tr>"
    )


def _confusion(kind: str, table: dict[str, Any]) -> str:
    answers = table["answers"]
    others = any(counts[-1] for counts in table["counts"])
    head = "".join(f"<th>{escape(answer)}" for answer in [*answers, *(["other"] if others else [])])
    rows = []
    for i, (answer, counts) in enumerate(zip(answers, table["counts"])):
        total = max(1, sum(counts))
        cells = "".join(
            f'<td{" class=right" if i == j else ""} style="background:rgb(var(--heat) / {SHADE * count / total:.2f})">{count or ""}'
            for j, count in enumerate(counts if others else counts[:-1])
        )
        rows.append(f"<tr><th>{escape(answer)}{cells}</tr>")
    return (
        f'<div class="scroll"><h3>{escape(kind)}</h3><table class="confusion"><thead><tr><th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _controls(shown: Sequence[Example]) -> str:
    kinds = sorted({example.row["type"] for example in shown})
    options = "".join(f'<option value="{escape(kind)}">{escape(kind)}</option>' for kind in kinds)
    key = ""
    if any(example.row["true_points"] or example.row["answer_points"] for example in shown):
        marks = ((_RING, "true point"), (_CROSS, "answer"))
        key = "".join(f'<span class="key"><svg viewBox="-12 -12 24 24">{mark}</svg>{name}</span>' for mark, name in marks)
    return f'<h2>Examples</h2><div class="controls"><label>Type <select><option value="">all</option>{options}</select></label>{key}</div>'


def _card(example: Example) -> str:
    row = example.row
    if example.picture:
        width, height = example.size
        picture = f'<img loading="lazy" width="{width}" height="{height}" alt="" src="{example.picture}">'
        marks = _marks(row["true_points"], _RING, example.size) + _marks(row["answer_points"], _CROSS, example.size)
        if example.single and marks:
            picture += f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{marks}</svg>'
        figure = f"<figure>{picture}</figure>"
    else:
        figure = f'<div class="none">{escape("not shown: " + example.missing)}</div>' if example.missing else ""
    colour = "good" if row["score"] >= RIGHT else "bad"
    expected = " · ".join(dict.fromkeys(row["answers"][:_ANSWERS]))
    place = f"{os.path.basename(row['source'])}, row {row['row']}"
    return (
        f'<article class="card" data-type="{escape(row["type"])}">{figure}<div class="text">'
        f'<div class="top"><span>{escape(row["type"])}</span><span class="score {colour}">{100 * row["score"]:.0f} %</span></div>'
        f"<div>{escape(row['question'])}</div>"
        f'<div class="said {colour}">{escape(row["prediction"] or "(nothing)")}</div><div class="expected">{escape(expected)}</div>'
        f"<small>{escape(place)}</small></div></article>"
    )


def _marks(points: Iterable[dict[str, float]], mark: str, size: tuple[int, int]) -> str:
    return "".join(f'<g transform="translate({p["x"] * size[0]:.1f} {p["y"] * size[1]:.1f})">{mark}</g>' for p in points or ())
