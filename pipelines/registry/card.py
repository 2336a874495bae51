"""The model card of a registered version: Markdown with what it is, its figures and pictures, its data, and how to use it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo_core.checkpoint.folder import locate
from molmo_core.checkpoint.safetensors_stream import SafetensorsReader
from molmo_core.registry import BaseModelConfig


def card(
    name: str,
    checkpoint: Path,
    run_id: str | None,
    evaluation: dict[str, Any] | None,
    data: dict[str, Any] | None,
    pictures: Sequence[str],
    requirements: Sequence[str],
) -> str:
    """The card's text.

    Args:
        name: of the registered model.
        checkpoint: the version's weights and configuration.
        run_id: the run that trained it.
        evaluation, data: the reports of jobs.evaluate and jobs.prepare.
        pictures: of the evaluation, relative to the card.
        requirements: `package==version`.
    """
    parts = [f"# {name}", _facts(checkpoint, run_id), "## Evaluation"]
    parts.append(_evaluation(evaluation) if evaluation else "It was not evaluated when it was registered.")
    parts += [f"![What it answers]({picture})" for picture in pictures]
    parts += ["## Data", _data(data) if data else "No report of its data was registered with it."]
    parts += ["## Use", _USE.format(name=name), "Made with " + ", ".join(requirements) + "."]
    return "\n\n".join(parts) + "\n"


_USE = """\
```python
import mlflow, pandas

model = mlflow.pyfunc.load_model("models:/{name}@champion")
model.predict(pandas.DataFrame({{"image": ["photo.jpg"], "prompt": ["What is in this picture?"]}}))
```

Behind an OpenAI-style API: `python -m jobs.serve configs/serve/own.yaml model=models:/{name}@champion`"""


def _facts(checkpoint: Path, run_id: str | None) -> str:
    config: Any = BaseModelConfig.load(locate(checkpoint))
    specs = SafetensorsReader(checkpoint).specs.values()
    size = sum(spec.nbytes for spec in specs)
    parameters = sum(spec.nbytes // spec.dtype.itemsize for spec in specs)
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in specs})
    facts = {
        "architecture": config.model_name,
        "parameters": f"{parameters:,} ({', '.join(dtypes)}, {size / 1e6:,.1f} MB)",
        "language model": f"{config.llm.n_layers} layers, width {config.llm.d_model}",
        "context": f"{config.llm.max_sequence_length:,} tokens",
        "registered": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }
    if run_id:
        facts["training run"] = f"`{run_id}`"
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts.items())])


def _evaluation(report: dict[str, Any]) -> str:
    lines = [f"{report['records']:,} records, {report['rejected']:,} of them could not be used.", ""]
    lines += ["| questions | number | score | 95 % interval | metric |", "|---|---:|---:|---:|---|"]
    if report.get("overall") is not None:
        lines.append(f"| **all but pointing** | {report['questions']:,} | **{report['overall']:.1%}** | {_interval(report)} | mean |")
    for kind, found in report["types"].items():
        lines.append(f"| {_cell(kind)} | {found['questions']:,} | {_share(found['score'])} | {_interval(found)} | {found['metric']} |")
    return "\n".join(lines)


def _data(report: dict[str, Any]) -> str:
    facts = {
        "records": report.get("rows_in"),
        "held out": report.get("rows_held_out"),
        "examples": report.get("rows_out"),
        "rejected": report.get("rows_rejected"),
        "tokens": report.get("tokens"),
        "crops and frames": report.get("crops"),
    }
    lines = [f"| {what} | {value:,} |" for what, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---:|", *lines, "", "More in [its report](data_report/report.html)."])


def _share(score: float | None) -> str:
    return "" if score is None else f"{score:.1%}"


def _interval(figure: dict[str, Any]) -> str:
    return f"{figure['low']:.1%} to {figure['high']:.1%}" if figure.get("low") is not None else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
