"""Small bar charts as SVG, for pages that carry everything they need."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT, MARGIN = 460, 180, 34


def histogram(values: Sequence[float], title: str, unit: str, bins: int = 24) -> str:
    """A histogram with its median and largest value.

    Args:
        values: what is counted; none gives a chart that says so.
        title: above the bars.
        unit: of `values`, under the axis.
    """
    if not len(values):
        return _chart(title, "none", [], [])
    data = np.asarray(values, np.float64)
    low, high = float(data.min()), float(data.max())
    integer = bool((data == np.round(data)).all())
    if integer and high - low < bins:
        bins = int(high - low) + 1
        edges = np.arange(bins + 1) + low - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, _ = np.histogram(data, edges)
    digits = 0 if integer else 1
    note = f"{unit} · median {np.median(data):,.{digits}f}, largest {high:,.{digits}f}"
    return _chart(title, note, counts.tolist(), [f"{low:,.{digits}f}", f"{high:,.{digits}f}"])


def bars(counts: dict[str, int], title: str) -> str:
    """Horizontal bars with their names."""
    top = max(counts.values(), default=1)
    rows = "".join(
        f'<text x="0" y="{38 + 22 * i}" class="label">{html.escape(name)}</text>'
        f'<rect x="260" y="{26 + 22 * i}" width="{max(2, 150 * count / top):.1f}" height="14" class="bar"/>'
        f'<text x="{266 + max(2, 150 * count / top):.1f}" y="{38 + 22 * i}" class="label">{count:,}</text>'
        for i, (name, count) in enumerate(counts.items())
    )
    return _svg(title, rows, 34 + 22 * len(counts))


def _chart(title: str, note: str, counts: list[int], ends: list[str]) -> str:
    top, step = max(counts, default=1), WIDTH / max(len(counts), 1)
    area = HEIGHT - 2 * MARGIN
    body = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{MARGIN + area * (1 - count / top):.1f}" width="{step - 2:.1f}" '
        f'height="{area * count / top:.1f}" class="bar"><title>{count:,}</title></rect>'
        for i, count in enumerate(counts)
    )
    body += f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT - MARGIN}" y2="{HEIGHT - MARGIN}" class="axis"/>'
    if ends:
        body += f'<text x="0" y="{HEIGHT - 18}" class="label">{ends[0]}</text>'
        body += f'<text x="{WIDTH}" y="{HEIGHT - 18}" class="label" text-anchor="end">{ends[1]}</text>'
    body += f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" class="label" text-anchor="middle">{html.escape(note)}</text>'
    return _svg(title, body, HEIGHT)


def _svg(title: str, body: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="0" y="16" class="title">{html.escape(title)}</text>{body}</svg>'
    )
