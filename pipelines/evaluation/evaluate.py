"""Distributed evaluation: records → answers on every worker → scores → a report."""

from __future__ import annotations

import collections
import json
import re
import time
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from molmo_core.config import ConfigError
from pipelines import cluster, tracking
from pipelines.cluster import quiet, reading
from pipelines.data.rejects import Rejects
from pipelines.data.sources import Records, open_records
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.picture import draw_answers
from pipelines.evaluation.worker import Worker
from pipelines.files import output_folder, write_text
from pipelines.model_folder import fixed_model
from pipelines.progress import RecordProgress

OVERALL = "overall"
REPORT, PREDICTIONS, PICTURE = "report.json", "predictions.jsonl", "answers.png"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates a model, on the cluster that is connected or a new one.

    Returns:
        the report, also written to `report.json`: `questions` (number), `overall` (mean score of all questions but pointing),
        `types` ({type: {questions, metric, score}}), `records`, `rejected`, `reasons` ({reason: number}), `seconds`.

    Raises:
        ConfigError: no such model or records, an output that cannot be written, or too many records that cannot be used.
    """
    started = time.perf_counter()
    folder = output_folder(config.output)
    records = open_records(config.records, config.format)
    total = min(len(records), config.limit or len(records))
    model = fixed_model(config.model)
    with cluster.connect():
        ordered = _answered(config, model, records, total)
    report = summarise(ordered, config)
    report["seconds"] = round(time.perf_counter() - started, 1)
    write_text(folder / PREDICTIONS, "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in ordered))
    write_text(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    draw_answers(ordered, records, config.samples).save(folder / PICTURE)
    return report


def _answered(config: EvaluateConfig, model: str, records: Records, total: int) -> list[dict[str, Any]]:
    """What the workers made of every record, in order."""
    workers = config.workers or _capacity(config)
    batches = -(-total // config.records_per_batch)
    quiet()
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
    right = asked = 0.0
    rejects = Rejects(config.max_reject_rate)
    with RecordProgress("evaluate", total) as progress, reading(stage.iter_rows()) as rows:
        for row in rows:
            result = json.loads(row["result"])
            results[result["record"]] = result
            why = [tuple(result[key] for key in ("source", "row", "rejected", "detail"))] if "rejected" in result else []
            rejects.add({result["source"]: 1}, why)
            rejects.check()
            for question in result.get("questions", ()):
                right, asked = right + question["score"], asked + 1
            progress.update(len(results), f"{right / asked:.1%} right" if asked else "")
    if len(results) != total:
        raise RuntimeError(f"{config.records}: {total} records, but results of {len(results)}")
    return [results[i] for i in sorted(results)]


def read_report(config: EvaluateConfig) -> dict[str, Any]:
    """The report that an evaluation left in `output`.

    Raises:
        ConfigError: there is none of this model.
    """
    path = Path(config.output) / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such report; evaluate first") from None
    if report["model"] != config.model:
        raise ConfigError(f"{path} is of {report['model']}, not of {config.model}")
    return report


def record(report: dict[str, Any], config: EvaluateConfig, run: tracking.Run) -> None:
    """Adds an evaluation to an MLflow run: its scores as metrics, report and picture as artifacts."""
    scores = {_metric_name(kind): figures["score"] for kind, figures in report["types"].items()} | {OVERALL: report["overall"]}
    run.log_metrics({f"{tracking.EVALUATION}{name}": value for name, value in scores.items() if value is not None})
    for name in (REPORT, PICTURE):
        run.log_file(Path(config.output) / name, "evaluation")


def _metric_name(kind: str) -> str:
    """A question type as it is, unless it would be taken for the overall score."""
    return f"type/{kind}" if re.fullmatch(f"(type/)*{OVERALL}", kind) else kind


def summarise(results: list[dict[str, Any]], config: EvaluateConfig) -> dict[str, Any]:
    """The report of all records' results."""
    scores: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for result in results:
        for question in result.get("questions", ()):
            scores[question["type"], question["metric"]].append(question["score"])
    # Pointing is another kind of task; the mean over answers to questions stays comparable to published figures without it.
    answers = [value for (_, metric), values in scores.items() if metric != "pointing" for value in values]
    reasons = collections.Counter(result["rejected"] for result in results if "rejected" in result)
    return {
        "model": config.model,
        "records": len(results),
        "rejected": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
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
