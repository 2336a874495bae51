"""An evaluation in MLflow: scores as metrics, report, pictures and predictions as artifacts."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines import tracking
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.report import PAGE, PICTURE, REPORT, Report
from pipelines.evaluation.results import FOLDER

OVERALL = "overall"


def record(report: Report, config: EvaluateConfig, run: tracking.Run) -> None:
    """Adds an evaluation to an MLflow run."""
    figures = report.figures
    scores = {_metric_name(kind): found["score"] for kind, found in figures["types"].items()} | {OVERALL: figures["overall"]}
    run.log_metrics({f"{tracking.EVALUATION}{name}": value for name, value in scores.items() if value is not None})
    for name in (REPORT, PAGE, PICTURE):
        run.log_file(Path(config.output) / name, "evaluation")
    run.log_file(Path(config.output) / FOLDER, f"evaluation/{FOLDER}")


def _metric_name(kind: str) -> str:
    """A question type as it is, unless it would be taken for the overall score."""
    return f"type/{kind}" if re.fullmatch(f"(type/)*{OVERALL}", kind) else kind
