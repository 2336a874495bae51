"""Measures a model: its answers to the questions of records, scored, with a report and a picture."""

from __future__ import annotations

from typing import Any

from jobs.command import ConfigPath, Overrides, job
from pipelines import cluster, tracking
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.evaluate import PICTURE, evaluate, record


def describe(report: dict[str, Any]) -> str:
    """The report as a small table."""
    lines = [f"{'questions':<16}{'number':>8}  {'score':>7}"]
    overall = [("all", {"questions": report["questions"], "score": report["overall"]})] if report["questions"] else []
    for kind, figures in [*overall, *report["types"].items()]:
        lines.append(f"{kind:<16}{figures['questions']:>8,}  {figures['score']:>7.1%}")
    if report["rejected"]:
        lines.append(f"{report['rejected']} of {report['records']} records could not be used (see predictions.jsonl)")
    return "\n".join(lines)


def main(config: ConfigPath, overrides: Overrides = None) -> None:
    """Answers the questions of records with a model on all workers and scores the answers."""
    settings = EvaluateConfig.load(config, overrides)
    with cluster.connect():
        report = evaluate(settings)
    with tracking.Run("evaluation", settings.model) as run:
        run.log_params(settings.as_dict())
        record(report, settings, run)
    print(f"{settings.model} on {settings.records}, {report['seconds']} s\n\n{describe(report)}\n")
    print(f"Report, predictions and {PICTURE} are in {settings.output}; MLflow run {run.id}")


app = job(main)

if __name__ == "__main__":
    app()
