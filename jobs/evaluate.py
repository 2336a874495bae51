"""Measures a model: its answers to the questions of records, scored, with a report and a picture."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs.command import ConfigPath, Overrides, job
from pipelines.evaluation.config import EvaluateConfig
from pipelines.names import masked


def describe(report: dict[str, Any]) -> str:
    """The report as a small table."""
    apart = [kind for kind, figures in report["types"].items() if figures["metric"] == "pointing"]
    overall = {"questions": report["questions"], "metric": "mean", "score": report["overall"]}
    rows = {"all but pointing" if apart else "all": overall} if report["questions"] else {}
    lines = [f"{'questions':<24}{'number':>8}  {'score':>7}  metric"]
    for kind, figures in [*rows.items(), *report["types"].items()]:
        lines.append(f"{kind:<24}{figures['questions']:>8,}  {figures['score']:>7.1%}  {figures['metric']}")
    if report["rejected"]:
        reasons = ", ".join(f"{number:,} x {reason}" for reason, number in report["reasons"].items())
        lines.append(f"{report['rejected']:,} of {report['records']:,} records could not be used ({reasons}); see predictions.jsonl")
    return "\n".join(lines)


def save_in_mlflow(report: dict[str, Any], settings: EvaluateConfig) -> str:
    """Records an evaluation as an MLflow run and returns its id.

    Raises:
        TrackingError: MLflow did not take it; the report in `output` is not touched.
    """
    from pipelines import tracking
    from pipelines.evaluation.evaluate import record

    try:
        with tracking.Run("evaluation", settings.model) as run:
            run.log_params(settings.as_dict())
            record(report, settings, run)
    except Exception as error:  # of a database, a server or a disk
        raise tracking.TrackingError(
            f"the evaluation is done and in {settings.output}, but MLflow did not record it ({type(error).__name__}: {error}).\n"
            "Once MLflow works, the same command with --record records it without evaluating again."
        ) from error
    return run.id


def main(
    config: ConfigPath,
    overrides: Overrides = None,
    record_only: Annotated[bool, typer.Option("--record", help="Evaluate nothing; record the report in `output` in MLflow.")] = False,
) -> None:
    """Answers the questions of records with a model on all workers and scores the answers."""
    settings = EvaluateConfig.load(config, overrides)
    if not record_only:
        check_places(settings)
    # Only now what takes seconds to import: mistakes are shown at once.
    from pipelines import tracking
    from pipelines.evaluation.evaluate import PICTURE, evaluate, read_report

    if record_only:
        report = read_report(settings)
    else:
        tracking.client()  # a wrong address is told now, not after the work
        report = evaluate(settings)
    print(f"{settings.model} on {settings.records}, {report['seconds']} s\n\n{describe(report)}\n", flush=True)
    print(f"Report, predictions and {PICTURE} are in {settings.output}", flush=True)
    print(f"MLflow   {masked(tracking.tracking_uri())} run {save_in_mlflow(report, settings)}")


def check_places(settings: EvaluateConfig) -> None:
    """Raises ConfigError for records or a model that are not there, or an output that cannot be written; light."""
    from pipelines.data.sources import find_records
    from pipelines.files import output_folder
    from pipelines.model_folder import fixed_model

    find_records(settings.records)
    fixed_model(settings.model)
    output_folder(settings.output)


app = job(main, EvaluateConfig)

if __name__ == "__main__":
    app()
