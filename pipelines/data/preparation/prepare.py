"""Records → a prepared dataset: Arrow shards, an index, the rejected rows, a report. Restartable at any moment."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from molmo_core.checkpoint.published_config import PROCESSOR_FILES
from molmo_core.config import ConfigError
from molmo_core.preprocessing.data_formatter import Formatter
from molmo_core.registry import BaseModelConfig
from pipelines.cluster import quiet, reading
from pipelines.data import schema
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import PrepareConfig
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.preparation import easy_vqa
from pipelines.data.preparation.report import write_report
from pipelines.data.preparation.shards import read_summary, withdraw, write_shard
from pipelines.data.preparation.train_tokenizer import train_tokenizer
from pipelines.data.records.fetching import THREADS
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected, Rejects, TooManyRejected
from pipelines.data.sources import Records, open_records
from pipelines.files import write_table, write_text
from pipelines.model_folder import model_folder

STATE, DATASET, INDEX, REPORT, REJECTED = "prepare.json", "dataset.json", "index.parquet", "report.json", "rejected.parquet"
STOPPED = "stopped.txt"
"""Left by a run that stopped because too many records were unusable."""
LINE_EVERY_S = 30.0
_TOKENIZER_RECORDS = 100_000


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Runs a preparation, or what is left of it. Ray must be connected.

    Returns:
        The report (also written to `report.json`).

    Raises:
        ConfigError: the folder holds another preparation, or the records cannot be opened.
        TooManyRejected: a source is worse than `max_reject_rate`.
    """
    config.require_paths()
    started = time.perf_counter()
    folder = Path(config.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = _easy_vqa(folder, config.limit) if config.records == "easy-vqa" else config.records
    records = open_records(path, config.format)
    total = min(len(records), config.limit or len(records))
    shards = -(-total // config.shard_rows)
    _claim(folder, config, records)
    model = _model(folder, config, records, total)
    config = dataclasses.replace(config, sequence_length=config.sequence_length or model.llm.max_sequence_length)
    preprocessor = model.build_preprocessor(for_inference=False, is_training=True, max_seq_len=config.sequence_length)

    rejects = Rejects(config.max_reject_rate)
    _try_media_again(folder, shards)
    done = {k: summary for k in range(shards) if (summary := read_summary(folder, k))}
    for summary in done.values():
        rejects.add(summary["rows_in"], summary["rejected"])
    todo = [k for k in range(shards) if k not in done]
    if not todo and (folder / REPORT).is_file():
        return json.loads((folder / REPORT).read_text())
    before, shown = rejects.seen.total(), started
    try:
        with _progress() as progress:
            bar = progress.add_task("prepare", total=total, completed=before, rejected=rejects.total)
            for summary in _run(config, folder, records, preprocessor, todo, total):
                done[summary["shard"]] = summary
                rejects.add(summary["rows_in"], summary["rejected"])
                seen = rejects.seen.total()
                progress.update(bar, completed=seen, rejected=rejects.total)
                if not progress.console.is_terminal and time.perf_counter() - shown > LINE_EVERY_S:  # a log shows no bar until the end
                    shown = time.perf_counter()
                    print(f"prepare: {seen:,} of {total:,} records, {rejects.total:,} rejected", file=sys.stderr, flush=True)
                rejects.check()
        rejects.check(at_end=True)
    except TooManyRejected as error:
        _write_rejected(folder, done)
        write_text(folder / STOPPED, str(error))
        raise TooManyRejected(
            f"{error}. All rejected rows so far: {folder / REJECTED}. Start again when missing media are there (they are tried again), "
            f"with a larger max_reject_rate, or in an empty folder if the records change"
        ) from None
    return finish(folder, config, done, total, rejects.seen.total() - before, time.perf_counter() - started)


class ShardWriter:
    """The Ray Data actor that makes shards: reads, decodes, preprocesses and writes where the CPU is.

    A row of its input is a shard number. Raw pixels never leave the process, so memory is one medium at a time and nothing
    passes through the object store but summaries.
    """

    def __init__(self, folder: str, records: Any, builder: Any, shard_rows: int, total: int, seed: int):
        self.folder, self.seed, self.shard_rows, self.total = Path(folder), seed, shard_rows, total
        self.records = ray.get(records)
        self.builder = IsolatedBuilder(ray.get(builder))
        self.pool = concurrent.futures.ThreadPoolExecutor(THREADS)

    def __call__(self, batch: pa.Table) -> pa.Table:
        summaries = []
        for shard in batch.column("shard").to_pylist():
            rows = range(shard * self.shard_rows, min(self.total, (shard + 1) * self.shard_rows))
            summaries.append(write_shard(self.folder, shard, rows, self.records, self.builder, self.seed, self.pool))
        return pa.table({"summary": [json.dumps(s) for s in summaries]})


def _run(config: PrepareConfig, folder: Path, records: Records, preprocessor: Any, todo: list[int], total: int) -> Iterator[dict[str, Any]]:
    """Makes the missing shards on Ray Data actors; yields their summaries as they come."""
    if not todo:
        return
    builder = ExampleBuilder(preprocessor, config.max_image_pixels)
    actors = config.actors or max(1, int(ray.cluster_resources().get("CPU", 1)))
    quiet()
    dataset = ray.data.from_items([{"shard": k} for k in todo], override_num_blocks=len(todo)).map_batches(
        ShardWriter,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(actors, len(todo))),
        fn_constructor_args=(str(folder), ray.put(records), ray.put(builder), config.shard_rows, total, config.seed),
        num_cpus=1,
    )
    with reading(dataset.iter_rows()) as rows:
        for row in rows:
            yield json.loads(row["summary"])


def _easy_vqa(folder: Path, limit: int | None) -> str:
    """Writes both splits as records; the train split is prepared, the test split is for evaluation."""
    for split in ("train", "test"):
        easy_vqa.write(split, folder / "records" / f"{split}.jsonl", limit)
    return str(folder / "records" / "train.jsonl")


def _model(folder: Path, config: PrepareConfig, records: Records, total: int) -> Any:
    """The model configuration, with the tokenizer that was asked for."""
    if config.tokenizer is None:
        return BaseModelConfig.load(model_folder(config.model))
    target = folder / "tokenizer"
    if not target.is_dir():
        model: Any = BaseModelConfig.load(model_folder(config.model))
        texts = _texts(records, min(total, _TOKENIZER_RECORDS), Formatter(model.data_formatter), np.random.RandomState(config.seed))
        temporary = folder / ".tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        train_tokenizer(texts, config.tokenizer.vocab_size, temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    return BaseModelConfig.load(model_folder(config.model), overrides=[f"llm.tokenizer.identifier={target}"])


def _texts(records: Records, total: int, formatter: Formatter, rng: np.random.RandomState) -> Iterator[str]:
    """The texts of the records as the model will read and write them, roles included."""
    for i in range(total):
        try:
            for annotation in formatter(read_record(records[i]), rng, image_sizes=[(1000, 1000)]):
                yield from annotation.messages
        except (Rejected, ValueError):
            continue  # reported when its shard is made


def _try_media_again(folder: Path, shards: int) -> None:
    """After a stop because of too many rejected records: media that were missing then may be there now."""
    if (folder / STOPPED).is_file():
        for k in range(shards):
            summary = read_summary(folder, k)
            if summary and any(reason.startswith("media:") for _, _, reason, _ in summary["rejected"]):
                withdraw(folder, k)
        (folder / STOPPED).unlink()


def _claim(folder: Path, config: PrepareConfig, records: Records) -> None:
    """Notes what is being made here; refuses a folder that holds something else."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "actors", "max_reject_rate")}
    sources = records.stamp
    text = json.dumps([schema.VERSION, settings, _model_text(config.model), sources], sort_keys=True)
    state = {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], "settings": settings, "sources": sources}
    path = folder / STATE
    if path.is_file():
        found = json.loads(path.read_text())
        if found["fingerprint"] != state["fingerprint"]:
            old, new = found["settings"], settings
            changed = [k for k in new if old.get(k) != new[k]] or ["the records" if found["sources"] != sources else "the model"]
            raise ConfigError(f"{folder}: holds another preparation ({', '.join(changed)} changed); choose another output or delete it")
        return
    write_text(path, json.dumps(state, indent=2) + "\n")


def _model_text(model: str) -> str:
    """What a preparation takes of a model: its configuration, and the tokenizer of a model folder."""
    path = model_folder(model)
    names = ("config.yaml", "tokenizer/tokenizer.json", "config.json", "tokenizer.json", *PROCESSOR_FILES)
    files = [path] if path.is_file() else [path / name for name in names]
    return model if not path.exists() else "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _write_rejected(folder: Path, done: dict[int, dict[str, Any]]) -> None:
    rows = [row for k in sorted(done) for row in done[k]["rejected"]]
    kinds = {"source": pa.string(), "row": pa.int64(), "reason": pa.string(), "detail": pa.string()}
    table = pa.table({name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(kinds.items())})
    write_table(table, folder / REJECTED)


def finish(folder: Path, config: PrepareConfig, done: dict[int, dict[str, Any]], total: int, made: int, seconds: float) -> dict[str, Any]:
    """Checks the books, then writes index, rejected rows and report. `made` records took `seconds`; others were made before a stop."""
    rejects = Rejects(config.max_reject_rate)
    ordered = [done[k] for k in sorted(done)]
    for summary in ordered:
        rejects.add(summary["rows_in"], summary["rejected"])
    rows_in, rows_out = rejects.seen.total(), sum(s["rows_out"] for s in ordered)
    if rows_in != total or rows_in != rows_out + rejects.total:
        raise RuntimeError(f"{folder}: {total} records, but {rows_in} in = {rows_out} out + {rejects.total} rejected")
    _write_rejected(folder, done)
    rejected = [row for s in ordered for row in s["rejected"]]
    tokens = [n for s in ordered for n in s["tokens"]]
    crops = [n for s in ordered for n in s["crops"]]
    index = {"shard": [s["shard"] for s in ordered for _ in s["tokens"]], "tokens": tokens, "crops": crops}
    write_table(pa.table({k: pa.array(v, pa.int64()) for k, v in index.items()}), folder / INDEX)
    report = {
        "rows_in": rows_in,
        "rows_out": rows_out,
        "rows_rejected": rejects.total,
        "rejected_by_reason": rejects.by_reason(),
        "seconds": round(seconds, 2),
        "rows_per_second": round(made / max(seconds, 1e-9), 1),
        "sequence_length": config.sequence_length or max(tokens, default=0),
        "truncated": sum(s["truncated"] for s in ordered),
        "fields_not_used": dict(sum((collections.Counter(s["fields_not_used"]) for s in ordered), collections.Counter()).most_common()),
        "tokens": sum(tokens),
        "longest": max(tokens, default=0),
        "crops": sum(crops),
        "bytes": sum(s["bytes"] for s in ordered),
        "shards": len(ordered),
    }
    write_report(folder, report, tokens, crops, rejected)
    write_text(folder / DATASET, json.dumps({"version": schema.VERSION, "rows": rows_out, "shards": len(ordered)}) + "\n")
    write_text(folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("records · {task.fields[rejected]} rejected ·"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
