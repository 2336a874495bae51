"""Records → a prepared dataset: Arrow shards, an index, the rejected rows, a report. Restartable at any moment."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from molmo_core.config import ConfigError
from molmo_core.preprocessing.data_formatter import Formatter
from pipelines.cluster import reading
from pipelines.data import easy_vqa, schema
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import PrepareConfig
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.records import normalise
from pipelines.data.report import write_report
from pipelines.data.shards import read_summary, write_shard
from pipelines.data.sources import Records, Rejected, open_records
from pipelines.data.tokenizer import train_tokenizer

STATE, DATASET, INDEX, REPORT, REJECTED = "prepare.json", "dataset.json", "index.parquet", "report.json", "rejected.parquet"
RATE_FROM_ROWS = 100
"""The share of rejected rows is judged over at least so many: one bad row of three is no reason to stop."""
_TOKENIZER_RECORDS = 100_000


class TooManyRejected(ConfigError):
    """More records of a source were unusable than the configuration allows."""


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

    tally = Tally(config.max_reject_rate)
    done = {k: summary for k in range(shards) if (summary := read_summary(folder, k))}
    for summary in done.values():
        tally.add(summary)
    todo = [k for k in range(shards) if k not in done]
    try:
        with _progress() as progress:
            bar = progress.add_task("prepare", total=total, completed=tally.rows_in, rejected=tally.rows_rejected)
            for summary in _run(config, folder, records, preprocessor, todo, total):
                done[summary["shard"]] = summary
                tally.add(summary)
                progress.update(bar, completed=tally.rows_in, rejected=tally.rows_rejected)
                tally.check()
        tally.check()
    except TooManyRejected as error:
        _write_rejected(folder, done)
        raise TooManyRejected(f"{error}. All rejected rows so far: {folder / REJECTED}") from None
    return finish(folder, config, done, total, time.perf_counter() - started)


class Tally:
    """Rows in, out and rejected, by source and reason."""

    def __init__(self, max_reject_rate: float):
        self.max_reject_rate = max_reject_rate
        self.seen: collections.Counter[str] = collections.Counter()
        self.rejected: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.rows_out = 0

    def add(self, summary: dict[str, Any]) -> None:
        """Counts the summary of a shard."""
        self.seen.update(summary["rows_in"])
        self.rows_out += summary["rows_out"]
        for source, _, reason, _ in summary["rejected"]:
            self.rejected[source][reason] += 1

    @property
    def rows_in(self) -> int:
        return self.seen.total()

    @property
    def rows_rejected(self) -> int:
        return sum(c.total() for c in self.rejected.values())

    def by_reason(self) -> dict[str, int]:
        """Rejected rows of all sources, most frequent reason first."""
        return dict(sum(self.rejected.values(), collections.Counter()).most_common())

    def check(self) -> None:
        """Raises TooManyRejected, naming the source."""
        for source, reasons in self.rejected.items():
            if reasons.total() > self.max_reject_rate * max(self.seen[source], RATE_FROM_ROWS):
                shown = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
                raise TooManyRejected(
                    f"{source}: {reasons.total():,} of {self.seen[source]:,} records rejected, more than max_reject_rate="
                    f"{self.max_reject_rate:g} allows ({shown})"
                )


class ShardWriter:
    """The Ray Data actor that makes shards: reads, decodes, preprocesses and writes where the CPU is.

    A row of its input is a shard number. Raw pixels never leave the process, so memory is one medium at a time and nothing
    passes through the object store but summaries.
    """

    def __init__(self, folder: str, records: Any, builder: Any, shard_rows: int, total: int, seed: int):
        self.folder, self.seed, self.shard_rows, self.total = Path(folder), seed, shard_rows, total
        self.records = ray.get(records)
        self.builder = IsolatedBuilder(ray.get(builder))

    def __call__(self, batch: pa.Table) -> pa.Table:
        summaries = []
        for shard in batch.column("shard").to_pylist():
            rows = range(shard * self.shard_rows, min(self.total, (shard + 1) * self.shard_rows))
            summaries.append(write_shard(self.folder, shard, rows, self.records, self.builder, self.seed))
        return pa.table({"summary": [json.dumps(s, ensure_ascii=False) for s in summaries]})


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
    from molmo_core.models.base import BaseModelConfig

    if config.tokenizer is None:
        return BaseModelConfig.load(config.model)
    target = folder / "tokenizer"
    if not (target / "tokenizer.json").is_file():
        model: Any = BaseModelConfig.load(config.model)
        texts = _texts(records, min(total, _TOKENIZER_RECORDS), Formatter(model.data_formatter), np.random.RandomState(config.seed))
        train_tokenizer(texts, config.tokenizer.vocab_size, target)
    return BaseModelConfig.load(config.model, overrides=[f"llm.tokenizer.identifier={target}"])


def _texts(records: Records, total: int, formatter: Formatter, rng: np.random.RandomState) -> Iterator[str]:
    """The texts of the records as the model will read and write them, roles included."""
    for i in range(total):
        try:
            for annotation in formatter(normalise(records[i]), rng, image_sizes=[(1000, 1000)]):
                yield from annotation.messages
        except (Rejected, ValueError):
            continue  # reported when its shard is made


def _claim(folder: Path, config: PrepareConfig, records: Records) -> None:
    """Notes what is being made here; refuses a folder that holds something else."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "actors", "max_reject_rate")}
    model = Path(config.model).read_text() if Path(config.model).is_file() else config.model
    sources = [[s.path, len(s)] for s in records.sources]
    text = json.dumps([schema.VERSION, settings, model, sources], sort_keys=True)
    state = {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], "settings": settings, "sources": sources}
    path = folder / STATE
    if path.is_file():
        found = json.loads(path.read_text())
        if found["fingerprint"] != state["fingerprint"]:
            old, new = found["settings"], settings
            changed = [k for k in new if old.get(k) != new[k]] or ["the model file or the records"]
            raise ConfigError(f"{folder}: holds another preparation ({', '.join(changed)} changed); choose another output or delete it")
        return
    path.write_text(json.dumps(state, indent=2) + "\n")


def _write_rejected(folder: Path, done: dict[int, dict[str, Any]]) -> None:
    rows = [row for k in sorted(done) for row in done[k]["rejected"]]
    kinds = {"source": pa.string(), "row": pa.int64(), "reason": pa.string(), "detail": pa.string()}
    table = pa.table({name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(kinds.items())})
    pq.write_table(table, folder / REJECTED)


def finish(folder: Path, config: PrepareConfig, done: dict[int, dict[str, Any]], total: int, seconds: float) -> dict[str, Any]:
    """Checks the books, then writes index, rejected rows and report."""
    tally = Tally(config.max_reject_rate)
    ordered = [done[k] for k in sorted(done)]
    for summary in ordered:
        tally.add(summary)
    if tally.rows_in != total or tally.rows_in != tally.rows_out + tally.rows_rejected:
        raise RuntimeError(f"{folder}: {total} records, but {tally.rows_in} in = {tally.rows_out} out + {tally.rows_rejected} rejected")
    _write_rejected(folder, done)
    rejected = [row for s in ordered for row in s["rejected"]]
    tokens = [n for s in ordered for n in s["tokens"]]
    crops = [n for s in ordered for n in s["crops"]]
    index = {"shard": [s["shard"] for s in ordered for _ in s["tokens"]], "tokens": tokens, "crops": crops}
    pq.write_table(pa.table({k: pa.array(v, pa.int64()) for k, v in index.items()}), folder / INDEX)
    report = {
        "rows_in": tally.rows_in,
        "rows_out": tally.rows_out,
        "rows_rejected": tally.rows_rejected,
        "rejected_by_reason": tally.by_reason(),
        "seconds": round(seconds, 2),
        "rows_per_second": round(tally.rows_in / max(seconds, 1e-9), 1),
        "sequence_length": config.sequence_length or max(tokens, default=0),
        "truncated": sum(s["truncated"] for s in ordered),
        "tokens": sum(tokens),
        "longest": max(tokens, default=0),
        "crops": sum(crops),
        "bytes": sum(s["bytes"] for s in ordered),
        "shards": len(ordered),
    }
    (folder / DATASET).write_text(json.dumps({"version": schema.VERSION, "rows": tally.rows_out, "shards": len(ordered)}) + "\n")
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_report(folder, report, tokens, crops, rejected)
    return report


def quiet() -> None:
    """Ray Data's own progress reports off: the jobs show theirs."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that they are off


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("records · {task.fields[rejected]} rejected ·"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
