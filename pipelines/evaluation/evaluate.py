"""Distributed evaluation: records → answers on every worker → scores, shard by shard → a report. Restartable at any moment."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from molmo_core.checkpoint.checksums import CHECKSUMS_NAME
from molmo_core.config import ConfigError
from pipelines import cluster
from pipelines.cluster import quiet, reading
from pipelines.data.rejects import Rejects
from pipelines.data.sources import open_records
from pipelines.evaluation.columns import mapped
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.report import Report, finished_report, write_report
from pipelines.evaluation.results import claim, decode
from pipelines.evaluation.worker import Worker
from pipelines.files import output_folder
from pipelines.model_folder import fixed_model
from pipelines.progress import RecordProgress

UNDECIDING = ("model", "records", "output", "workers", "cpus_per_worker", "gpus_per_worker", "samples", "examples", "max_reject_rate")
"""Settings that change neither answers nor scores, or are noted otherwise."""
COUNTED = ("record", "source", "row", "score", "rejected", "detail")


def evaluate(config: EvaluateConfig) -> Report:
    """Evaluates a model, or what is left of it, on the cluster that is connected or a new one.

    Raises:
        ConfigError: no such model or records, an output that cannot be written or holds another evaluation, or too many records
            (or all) that cannot be used.
    """
    return Evaluation(config).run()


class Evaluation:
    """An evaluation whose model, records and folder are checked. Only `run` needs Ray.

    Attributes:
        report: of the finished evaluation that the folder holds, None while something is left to do.

    Raises:
        ConfigError: as `evaluate`.
    """

    def __init__(self, config: EvaluateConfig):
        self.config, self.folder = config, output_folder(config.output)
        self.records = mapped(open_records(config.records, config.format), config.fields)
        self.total = min(len(self.records), config.limit or len(self.records))
        self.model = fixed_model(config.model)
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNDECIDING}
        self.results = claim(self.folder, settings, _stamp(self.model), self.records.stamp, self.total)
        self._rejects = Rejects(config.max_reject_rate)
        self._right = self._asked = 0.0
        self.report = finished_report(self.folder, self.results)
        self._todo = [] if self.report else [shard for shard in self.results.shards if not self._is_done(shard)]

    @property
    def records_done(self) -> int:
        """Records whose results are written."""
        return self.total if self.report else self._rejects.seen.total()

    def run(self) -> Report:
        """Answers what is left and writes the report; nothing if all is there."""
        if self.report is not None:
            return self.report
        started = time.perf_counter()
        if self._todo:
            with cluster.connect(), RecordProgress("evaluate", self.total, self.records_done) as progress:
                for shard, file in self._made():
                    self.results.commit(shard, file)
                    self._count(decode(file, COUNTED))
                    self._rejects.check()
                    progress.update(self.records_done, f"{self._right / self._asked:.1%} right" if self._asked else "")
        self._rejects.check(at_end=True)
        self.report = write_report(self.config, self.results, self.records, time.perf_counter() - started)
        return self.report

    def _is_done(self, shard: int) -> bool:
        """Whether a shard is there, and no record in it may fare better now: media that did not come are asked for again."""
        table = self.results.read(shard, COUNTED)
        if table is None or any((reason or "").startswith("media:") for reason in table.column("rejected").unique().to_pylist()):
            return False
        self._count(table)
        return True

    def _count(self, table: pa.Table) -> None:
        records: dict[int, dict[str, Any]] = {row["record"]: row for row in table.to_pylist()}
        for row in records.values():
            rejected = [(row["source"], row["row"], row["rejected"], row["detail"])] if row["rejected"] else []
            self._rejects.add({row["source"]: 1}, rejected)
        scores = table.column("score").drop_null().to_numpy()
        self._right, self._asked = self._right + scores.sum(), self._asked + len(scores)

    def _made(self) -> Iterator[tuple[int, bytes]]:
        """The missing shards, as they come: number and Parquet file."""
        workers = self.config.workers or _capacity(self.config)
        quiet()
        # The numbers come from here, not from a read task, which would want a CPU that the workers hold.
        numbers = ray.data.from_items([{"shard": shard} for shard in self._todo], override_num_blocks=len(self._todo))
        stage = numbers.map_batches(
            Worker,
            fn_constructor_args=(self.config, self.model, ray.put(self.records), self.results.records),
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=min(workers, len(self._todo))),
            num_cpus=self.config.cpus_per_worker,
            num_gpus=self.config.gpus_per_worker,
        )
        with reading(stage.iter_rows()) as rows:
            for row in rows:
                yield int(row["shard"]), row["file"]


def _stamp(model: str) -> Any:
    """What changes when a model does: the checksums of its files or, if it has none, their sizes and times."""
    folder = Path(model)
    if not folder.is_dir():
        return model  # a version in the registry, a repository of the hub
    if (folder / CHECKSUMS_NAME).is_file():
        return (folder / CHECKSUMS_NAME).read_text(encoding="utf-8")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _capacity(config: EvaluateConfig) -> int:
    """Workers that the cluster has room for."""
    resources = ray.cluster_resources()
    rooms = [
        int(resources.get(name, 0) // need) for name, need in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)) if need
    ]
    if not rooms or min(rooms) < 1:
        raise ConfigError(f"evaluate: the cluster has no room for a worker: {config.cpus_per_worker} CPU, {config.gpus_per_worker} GPU")
    return min(rooms)
