"""Measures a model: its answers to the questions of records, scored, with a report and a picture."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import OptionalConfig, Overrides, file_and_changes, job
from molmo_core.config import overridden
from pipelines.evaluation.config import EvaluateConfig
from pipelines.names import file_name, masked

if TYPE_CHECKING:
    from pipelines.evaluation.report import Report


OUTPUTS = Path("runs/evaluations")
"""Where results go if no output is given."""


def describe(report: dict[str, Any]) -> str:
    """The report as a small table."""
    apart = [kind for kind, figures in report["types"].items() if figures["metric"] == "pointing"]
    overall = {"questions": report["questions"], "metric": "mean", "score": report["overall"]} | {k: report[k] for k in ("low", "high")}
    rows = {"all but pointing" if apart else "all": overall} if report["questions"] else {}
    lines = [f"{'questions':<24}{'number':>8}  {'score':>7}  {'95 % interval':>15}  metric"]
    for kind, figures in [*rows.items(), *report["types"].items()]:
        interval = f"{figures['low']:.1%} - {figures['high']:.1%}"
        lines.append(f"{kind:<24}{figures['questions']:>8,}  {figures['score']:>7.1%}  {interval:>15}  {figures['metric']}")
    if report["rejected"]:
        reasons = ", ".join(f"{number:,} x {reason}" for reason, number in report["reasons"].items())
        lines.append(
            f"{report['rejected']:,} of {report['records']:,} records could not be used ({reasons}); see `rejected` in predictions/"
        )
    return "\n".join(lines)


def save_in_mlflow(report: Report, settings: EvaluateConfig) -> str:
    """Records an evaluation as an MLflow run and returns its id.

    Raises:
        TrackingError: MLflow did not take it; the report in `output` is not touched.
    """
    from pipelines import tracking
    from pipelines.evaluation.recording import record

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


def read_settings(config: str | None, overrides: list[str] | None) -> EvaluateConfig:
    """The settings of a command line: of a file, or of overrides alone. Then, without an `output`, its folder is called after model and
    records."""
    file, changes = file_and_changes(config, overrides)
    if file is not None:
        return EvaluateConfig.load(file, changes)
    given = overridden({}, changes)
    if given.get("model") and given.get("records") and not given.get("output"):
        model, records = (re.sub(r"^models:/", "", str(given[key]).rstrip("/")) for key in ("model", "records"))
        model = "/".join(model.split("/")[-2:])
        given["output"] = str(OUTPUTS / file_name(f"{model.replace('/', '-')} on {os.path.splitext(os.path.basename(records))[0]}"))
    return EvaluateConfig.from_dict(given, source="command line")


def main(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    record_only: Annotated[bool, typer.Option("--record", help="Evaluate nothing; record the report in `output` in MLflow.")] = False,
) -> None:
    """Answers the questions of records with a model on all workers and scores the answers. Run it again to continue after a stop.

    Two settings are enough: `molmo evaluate model=CHECKPOINT records=FILE`. The metric is chosen by what a record has (options, points, a
    count, answers); the table says which.
    """
    settings = read_settings(config, overrides)
    if not record_only:
        check_places(settings)
    # Only now what takes seconds to import: mistakes are shown at once.
    from pipelines import tracking
    from pipelines.evaluation.evaluate import Evaluation
    from pipelines.evaluation.report import PAGE, PICTURE, read_report

    if record_only:
        report = read_report(settings)
    else:
        tracking.client()  # a wrong address is told now, not after the work
        evaluation = Evaluation(settings)
        if evaluation.report is not None:
            print(f"Nothing to answer: {settings.output} holds this evaluation.", flush=True)
        try:
            report = evaluation.run()
        except KeyboardInterrupt:
            done = f"{evaluation.records_done:,} of {evaluation.total:,} records are evaluated"
            print(f"Stopped: {done}. The same command continues from there.", file=sys.stderr)
            raise
    figures = report.figures
    print(f"{settings.model} on {settings.records}, {figures['seconds']} s\n\n{describe(figures)}\n", flush=True)
    print(f"Report   {settings.output}/{PAGE}, {PICTURE}, predictions/*.parquet", flush=True)
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
