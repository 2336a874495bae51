"""The demo's stages on one cluster: prepare, train, evaluate, register, serve and ask. `jobs.demo` is its command."""

from __future__ import annotations

import json
import logging
import mimetypes
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines import cluster, tracking
from pipelines.data.config import PrepareConfig
from pipelines.data.preparation.prepare import prepare
from pipelines.data.records.media import fetch
from pipelines.data.records.reading import read_record
from pipelines.data.sources import open_records
from pipelines.demo_config import DemoConfig, by_stage
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.questions import Question, media_of, questions
from pipelines.evaluation.recording import record
from pipelines.evaluation.report import PICTURE
from pipelines.registry.config import RegisterConfig
from pipelines.registry.register import register
from pipelines.serving import client
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port
from pipelines.training.config import TrainConfig
from pipelines.training.trainer import TrainResult, run_training

OBJECT_STORE = 512 << 20

console = Console()


def demo(config: DemoConfig, overrides: list[str] | None = None) -> dict[str, Any]:
    """Runs all stages on one cluster; returns what `summary.json` in the demo's folder holds."""
    started = time.perf_counter()
    changes, folder = by_stage(overrides), Path(config.folder)
    preparation = PrepareConfig.load(config.prepare, changes["prepare"])
    evaluation = EvaluateConfig.load(config.evaluate, changes["evaluate"])
    registration = RegisterConfig.load(config.register, changes["register"])
    tracking.check_names(registration.name, registration.alias)
    serve = ServeConfig.load(config.serve, [f"port={free_port()}", *changes["serve"]])
    tracking.client()
    shutil.rmtree(folder, ignore_errors=True)

    quiet()
    with cluster.connect(num_cpus=config.cpus, object_store_memory=OBJECT_STORE):  # one for all stages
        stage("Prepare", config.told["prepare"])
        prepared = prepare(preparation)
        console.print(f"{prepared['rows_out']:,} records, {prepared['tokens']:,} tokens in {prepared['seconds']:.0f} s", highlight=False)

        # The model's file names the tokenizer that the preparation has just trained, so it is read only now.
        training = TrainConfig.load(config.train, changes["train"])
        workers = f"{training.num_workers} workers with FSDP" if training.num_workers > 1 else "one worker"
        stage("Train", f"{config.told['train']}, {workers}")
        trained = run_training(training)
        if trained.checkpoint is None:
            console.print("The demo ends here; started again, it begins anew.")
            raise KeyboardInterrupt
        shutil.copytree(trained.checkpoint, folder / "model")

        stage("Evaluate", config.told["evaluate"])
        report = evaluate(evaluation)
        with tracking.Run(training.experiment, training.name, run_id=trained.run_id) as run:
            record(report, evaluation, run)
        shutil.copy(Path(evaluation.output) / PICTURE, folder / PICTURE)
        console.print(scores_table(report.figures))

        stage("Register", "in MLflow's model registry")
        registration.run_id = registration.run_id or trained.run_id
        registration.evaluation, registration.data = evaluation.output, preparation.output
        registered = register(registration)
        console.print(f"{registered['uri']} is version {registered['version']}", highlight=False)

        stage("Serve", f"{serve.model} with Ray Serve, and ask it over HTTP")
        with serving(serve) as url:
            answers = conversation(url, serve.served_name, evaluation.records, config.asked)

    summary = {
        "dataset": config.dataset,
        "train": train_summary(trained, training.num_workers),
        "eval": eval_summary(report.figures, config.asked),
        "registry": registered,
        "serve": {"answers": answers},
        "seconds_total": round(time.perf_counter() - started, 1),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def conversation(url: str, model: str, records: str, asked: list[str]) -> list[dict[str, str]]:
    """Asks a question of each type over HTTP, each about another record; the last answer is streamed.

    Returns:
        `question`, `answer` and `expected` of each.
    """
    answers = []
    for question, file in questions_to_ask(records, asked):
        console.print(f"[bold]{question.text}[/bold] ({Path(file).name}) ", end="", highlight=False)
        kind = mimetypes.guess_type(file)[0] or "image/png"
        body = client.request(model, question.text, Path(file).read_bytes(), kind)
        if question.type == asked[-1]:
            pieces = client.stream(url, body)
        else:
            pieces = iter([client.post(url, body)["choices"][0]["message"]["content"]])
        answer = ""
        for piece in pieces:
            console.print(piece, end="", style="green", highlight=False, markup=False)
            answer += piece
        expected = question.answers[0]
        console.print("" if answer == expected else f"  (expected: {expected})", style="dim", highlight=False, markup=False)
        answers.append({"question": question.text, "answer": answer, "expected": expected})
    return answers


def questions_to_ask(path: str, asked: list[str]) -> Iterator[tuple[Question, str]]:
    """A question of each type and the path of its image or video, from records spread over the file."""
    records = open_records(path)
    for k, kind in enumerate(asked):
        for i in range(k * len(records) // len(asked), len(records)):
            example = read_record(records[i])
            found = next((question for question in questions(example) if question.type == kind), None)
            if found:
                media = media_of(example)
                yield found, str(fetch(media["image" if "image" in media else "video"]))
                break


def train_summary(result: TrainResult, workers: int) -> dict[str, Any]:
    logged = [values for _, values in result.metrics if "loss" in values]
    speeds = sorted(values["tokens_per_second"] for values in logged if "tokens_per_second" in values)  # not of a first step alone
    return {
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "workers": workers,
        "first_loss": round(logged[0]["loss"], 4),
        "last_loss": round(logged[-1]["loss"], 4),
        "tokens_per_second": round(speeds[len(speeds) // 2]) if speeds else None,
    }


def eval_summary(report: dict[str, Any], asked: list[str]) -> dict[str, Any]:
    types = report["types"]
    scores = {kind: types[kind]["score"] if kind in types else None for kind in asked}
    return {"questions": report["questions"], "overall": report["overall"], **scores}


def scores_table(report: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("question", "number", "right"):
        table.add_column(name, justify="left" if name == "question" else "right")
    rows = {"all": {"questions": report["questions"], "score": report["overall"]}, **report["types"]}
    for kind, figures in rows.items():
        name = "pointing, within 5 % of the width" if kind == "pointing" else kind.replace("_", "/")
        table.add_row(name, f"{figures['questions']:,}", f"{figures['score']:.1%}")
    return table


def quiet() -> None:
    """Leaves the terminal to the demo: Ray's own notes on its actors and pipelines mean nothing to a newcomer."""
    for name in ("ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def stage(name: str, what: str) -> None:
    console.print()
    console.rule(f"[bold]{name}[/bold]  {what}", align="left")


def closing_words(config: DemoConfig, summary: dict[str, Any]) -> str:
    trained, scores, seconds, folder = summary["train"], summary["eval"], summary["seconds_total"], Path(config.folder)
    kept = "" if (name := Path(config.serve).stem) == "demo" else f" DEMO={name}"
    what = config.told["train"]
    return (
        f"Done in {int(seconds) // 60} min {int(seconds) % 60} s. {what[0].upper() + what[1:]} was trained for {trained['steps']:,} steps "
        f"({trained['seconds']:.0f} s),\nanswers {scores['overall']:.1%} of {scores['questions']:,} test questions, points right on "
        f"{scores['pointing']:.1%} of the images,\n"
        f"and is {summary['registry']['uri']}, version {summary['registry']['version']}.\n\n"
        f"  {folder / PICTURE!s:<36} what it answers and where it points\n"
        f"  {folder / 'summary.json'!s:<36} these numbers\n"
        f"  {'make serve' + kept:<36} keeps the model up: http://127.0.0.1:8000\n"
        f"  {'make playground' + kept:<36} the same, and its page in the browser\n"
        f"  {'make mlflow':<36} opens loss curves, pictures and the registry: http://127.0.0.1:5000\n"
    )
