"""Pictures of a run for people."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

Curve = Sequence[tuple[int, float]]


def training_curves(history: Mapping[str, Curve], title: str) -> Image.Image:
    """Loss and accuracy over the steps, with their validation values where there are any.

    Args:
        history: (step, value) of `loss`, `accuracy`, `validation/loss`, `validation/accuracy`; a step that was repeated after a crash
            counts with its last value.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for key, label, style in ((name, "training", "-"), (f"validation/{name}", "validation", "o--")):
            points = sorted(dict(history.get(key, ())).items())
            if points:
                axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        if history.get(f"validation/{name}"):
            axes.legend()
        if name == "accuracy":
            axes.set_ylim(0, 1)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")
