"""Records → a prepared dataset: Arrow shards, an index, the rejected rows, a report. Restartable at any moment."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from molmo_core.config import ConfigError
from pipelines.cluster import quiet, reading
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import PrepareConfig, ScenesConfig
from pipelines.data.example_settings import example_settings
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.preparation import books, easy_vqa
from pipelines.data.preparation.claim import FolderLock, claimed
from pipelines.data.preparation.emoji import records as emoji_records
from pipelines.data.preparation.shards import read_summary, withdraw, write_shard
from pipelines.data.preparation.train_tokenizer import model_for
from pipelines.data.records.fetching import THREADS
from pipelines.data.records.parts import TEST, Part
from pipelines.data.rejects import Rejects, TooManyRejected
from pipelines.data.sources import open_records
from pipelines.model_folder import model_folder
from pipelines.progress import RecordProgress

EMOJI_SCENES = "emoji-scenes"
"""In place of records: made here, as those of easy-vqa are."""


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Runs a preparation, or what is left of it. Ray must be connected. Returns and raises as `Preparation`."""
    return Preparation(config).run()


class Preparation:
    """A preparation whose settings, records, model and folder are checked (and whose tokenizer is trained, if it has one of its own).
    Only `run` needs Ray.

    Attributes:
        config: with what the model decides.
        held_out: number of records that `test.part.json` names.
        report: of the finished preparation that the folder holds, None while something is left to do.

    Raises:
        ConfigError: the folder holds another preparation, or one is at work there, or it cannot be written, or records or model cannot
            be opened.
    """

    def __init__(self, config: PrepareConfig):
        self._lock: FolderLock | None = None
        try:
            self._open(config)
        except BaseException:
            self.close()
            raise
        if self.report is not None:
            self.close()

    def _open(self, config: PrepareConfig) -> None:
        config.require_paths()
        if not model_folder(config.model).is_file():  # a checkpoint: its weights belong to its tokenizer
            config = dataclasses.replace(config, tokenizer=None)
        self.folder = Path(config.output).resolve()
        if config.records in (*easy_vqa.NAMES, EMOJI_SCENES):
            self._lock = FolderLock(self.folder)
        path = _made(self.folder, config) or config.records
        opened = open_records(path, config.format)
        total = min(len(opened), config.limit or len(opened))
        part = config.split and Part.of(path, config.format, config.seed, config.split.test, total, opened.stamp)
        self.records = opened.part(part.others()) if part else opened
        self.total = len(self.records) if part else total
        self.held_out = total - self.total
        self._lock = self._lock or FolderLock(self.folder)
        with claimed(self.folder, config, opened):
            model = model_for(self.folder, config, self.records, self.total)
            self.config = dataclasses.replace(config, sequence_length=config.sequence_length or model.llm.max_sequence_length)
            self.preprocessor = model.build_preprocessor(for_inference=False, is_training=True, max_seq_len=self.config.sequence_length)
            self.made_for = {"model": config.model, "settings": example_settings(model, self.preprocessor)}
        if part:
            part.write(self.folder / TEST)
        else:
            (self.folder / TEST).unlink(missing_ok=True)  # of a preparation that failed before its first shard
        self._try_media_again()
        shards = range(-(-self.total // config.shard_rows))
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:  # a shard is read for its checksums
            found = pool.map(lambda k: read_summary(self.folder, k), shards)
            self.done = {k: summary for k, summary in zip(shards, found) if summary is not None}
        self.todo = [k for k in shards if k not in self.done]
        report = self.folder / books.REPORT
        self.report: dict[str, Any] | None = json.loads(report.read_text()) if not self.todo and report.is_file() else None

    def run(self) -> dict[str, Any]:
        """Makes what is left; nothing if all is there. Ray must be connected.

        Returns:
            The report (also written to `report.json`).

        Raises:
            ConfigError: a shard cannot be written.
            TooManyRejected: a source is worse than `max_reject_rate`.
        """
        try:
            return self._run() if self.report is None else self.report
        finally:
            self.close()

    def _run(self) -> dict[str, Any]:
        started = time.perf_counter()
        rejects = Rejects(self.config.max_reject_rate)
        for summary in self.done.values():
            rejects.add(summary["rows_in"], summary["rejected"])
        before = rejects.seen.total()
        try:
            with RecordProgress("prepare", self.total, before) as progress:
                for summary in self._made():
                    self.done[summary["shard"]] = summary
                    rejects.add(summary["rows_in"], summary["rejected"])
                    progress.update(rejects.seen.total(), f"{rejects.total:,} rejected")
                    rejects.check()
            rejects.check(at_end=True)
        except TooManyRejected as error:
            raise books.stop(self.folder, self.done, error) from None
        made, seconds = rejects.seen.total() - before, time.perf_counter() - started
        self.report = books.close(
            self.folder, self.done, self.total, self.config.sequence_length, self.made_for, made, seconds, self.held_out
        )
        return self.report

    def close(self) -> None:
        """Lets other preparations into the folder; `run` does it, too."""
        if self._lock is not None:
            self._lock.release()

    @property
    def records_done(self) -> int:
        """Records in committed shards."""
        return sum(sum(summary["rows_in"].values()) for summary in self.done.values())

    def _made(self) -> Iterator[dict[str, Any]]:
        """Makes the missing shards on Ray Data actors; yields their summaries as they come."""
        if not self.todo:
            return
        config, todo = self.config, self.todo
        builder = ExampleBuilder(self.preprocessor, config.max_image_pixels)
        actors = config.actors or max(1, int(ray.cluster_resources().get("CPU", 1)))
        quiet()
        dataset = ray.data.from_items([{"shard": k} for k in todo], override_num_blocks=len(todo)).map_batches(
            ShardWriter,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(actors, len(todo))),
            fn_constructor_args=(str(self.folder), ray.put(self.records), ray.put(builder), config.shard_rows, self.total, config.seed),
            num_cpus=1,
        )
        with reading(dataset.iter_rows()) as rows:
            for row in rows:
                summary = json.loads(row["summary"])
                if "failed" in summary:
                    raise ConfigError(
                        f"{self.folder}: shard {summary['shard']} cannot be made: {summary['failed']}. Finished shards are kept: when the "
                        f"cause is gone, run the same command again to continue"
                    )
                yield summary

    def _try_media_again(self) -> None:
        """After a stop because of too many rejected records: media that were missing then may be there now."""
        if (self.folder / books.STOPPED).is_file():
            for k in range(-(-self.total // self.config.shard_rows)):
                summary = read_summary(self.folder, k)
                if summary and any(reason.startswith("media:") for _, _, reason, _ in summary["rejected"]):
                    withdraw(self.folder, k)
            (self.folder / books.STOPPED).unlink()


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
        return pa.table({"summary": [json.dumps(self.make(shard)) for shard in batch.column("shard").to_pylist()]})

    def make(self, shard: int) -> dict[str, Any]:
        """The summary of a shard, or why it could not be written."""
        rows = range(shard * self.shard_rows, min(self.total, (shard + 1) * self.shard_rows))
        try:
            return write_shard(self.folder, shard, rows, self.records, self.builder, self.seed, self.pool)
        except OSError as error:  # no space left, no permission, a disk that is gone: not to be tried again by Ray
            return {"shard": shard, "failed": f"{type(error).__name__}: {error}"}


def _made(folder: Path, config: PrepareConfig) -> str | None:
    """Writes the records that the project makes itself, every split; the path of those to prepare: the others are for evaluation."""
    if config.records in easy_vqa.NAMES:
        for split in ("train", "test"):
            easy_vqa.write(split, folder / "records" / f"{split}.jsonl", config.limit, easy_vqa.NAMES[config.records])
    elif config.records == EMOJI_SCENES:
        emoji_records.write(folder / "records", config.scenes or ScenesConfig(), config.seed)
    else:
        return None
    return str(folder / "records" / "train.jsonl")
