"""Distributed evaluation: records → answers on every worker → scores → a report."""

from __future__ import annotations

import collections
import json
import logging
import time
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from molmo_core.config import ConfigError
from pipelines import tracking
from pipelines.cluster import reading
from pipelines.data.sources import open_records
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.picture import draw_answers
from pipelines.evaluation.worker import Worker
from pipelines.model_folder import fixed_model

REPORT, PREDICTIONS, PICTURE = "report.json", "predictions.jsonl", "answers.png"
REJECTS_FROM_RECORDS = 100
"""The share of rejected records is judged over at least so many."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates a model. Ray must be connected.

    Returns:
        the report, also written to `report.json`: `questions` (number), `overall` (mean score of all questions but pointing),
        `types` ({type: {questions, metric, score}}), `records`, `rejected`, `seconds`.

    Raises:
        ConfigError: no such model or records, or too many records that cannot be used.
    """
    started = time.perf_counter()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    records = open_records(config.records, config.format)
    total = min(len(records), config.limit or len(records))
    model = fixed_model(config.model)
    workers = config.workers or _capacity(config)
    batches = -(-total // config.records_per_batch)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the bar below counts what matters here
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # The numbers come from here, not from a read task, which would want a CPU that the workers hold.
    numbers = ray.data.from_items([{"id": i} for i in range(total)], override_num_blocks=batches)
    stage = numbers.map_batches(
        Worker,
        fn_constructor_args=(config, model, records),
        batch_size=config.records_per_batch,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=min(workers, batches)),
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
    )
    results: dict[int, dict[str, Any]] = {}
    right = asked = rejected = 0.0
    with _progress() as progress, reading(stage.iter_rows()) as rows:
        bar = progress.add_task("evaluate", total=total, score="")
        for row in rows:
            result = json.loads(row["result"])
            results[result["record"]] = result
            if "rejected" in result:
                rejected += 1
                _check_rejected(rejected, len(results), config, result)
            for question in result.get("questions", ()):
                right, asked = right + question["score"], asked + 1
            progress.update(bar, advance=1, score=f"{right / asked:.1%}" if asked else "")
    ordered = [results[i] for i in sorted(results)]
    if len(ordered) != total:
        raise RuntimeError(f"{config.records}: {total} records, but results of {len(ordered)}")
    report = summarise(ordered, config)
    report["seconds"] = round(time.perf_counter() - started, 1)
    (folder / PREDICTIONS).write_text("".join(json.dumps(result, ensure_ascii=False) + "\n" for result in ordered))
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    draw_answers(ordered, records, config.samples).save(folder / PICTURE)
    return report


def record(report: dict[str, Any], config: EvaluateConfig, run: tracking.Run) -> None:
    """Adds an evaluation to an MLflow run: its scores as metrics, report and picture as artifacts."""
    scores = {kind: figures["score"] for kind, figures in report["types"].items()} | {"overall": report["overall"]}
    run.log_metrics({f"{tracking.EVALUATION}{name}": value for name, value in scores.items() if value is not None})
    for name in (REPORT, PICTURE):
        run.log_file(Path(config.output) / name, "evaluation")


def summarise(results: list[dict[str, Any]], config: EvaluateConfig) -> dict[str, Any]:
    """The report of all records' results."""
    scores: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for result in results:
        for question in result.get("questions", ()):
            scores[question["type"], question["metric"]].append(question["score"])
    # Pointing is another kind of task; the mean over answers to questions stays comparable to published figures without it.
    answers = [value for (_, metric), values in scores.items() if metric != "pointing" for value in values]
    return {
        "model": config.model,
        "records": len(results),
        "rejected": sum("rejected" in result for result in results),
        "questions": len(answers),
        "overall": _mean(answers),
        "types": {
            kind: {"questions": len(values), "metric": metric, "score": _mean(values)} for (kind, metric), values in sorted(scores.items())
        },
    }


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _capacity(config: EvaluateConfig) -> int:
    """Workers that the cluster has room for."""
    resources = ray.cluster_resources()
    rooms = [
        int(resources.get(name, 0) // need) for name, need in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)) if need
    ]
    if not rooms or min(rooms) < 1:
        raise ConfigError(f"evaluate: the cluster has no room for a worker: {config.cpus_per_worker} CPU, {config.gpus_per_worker} GPU")
    return min(rooms)


def _check_rejected(rejected: float, seen: int, config: EvaluateConfig, last: dict[str, Any]) -> None:
    if rejected > config.max_reject_rate * max(seen, REJECTS_FROM_RECORDS):
        raise ConfigError(
            f"{config.records}: {rejected:.0f} of {seen} records cannot be used, more than max_reject_rate={config.max_reject_rate:g} "
            f"allows; the last is record {last['record']}: {last['rejected']}"
        )


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("records · score {task.fields[score]} ·"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
