"""Streamed training data: a Ray Data pipeline a rank, plan → decode and preprocess actors → rows in the plan's order.

The plan is the source: a read task that goes through the rank's streams and emits small blocks of packs, as fast as the actors
take them. Actors are stateless, Ray Data keeps the order, and the states travel with the rows, so nothing has to be remembered
anywhere else. Media are decoded inside the actor that preprocesses them: raw pixels never cross the object store.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata

from molmo_core.config import ConfigError
from pipelines.cluster import reading
from pipelines.data import schema
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.packs import PackBuilder, States, Streamed, steps
from pipelines.data.plan import Draw, Stream
from pipelines.data.prepare import RATE_FROM_ROWS, quiet

_BLOCK_PACKS = 8
_PLAN = pa.schema({"packs": pa.string(), "states": pa.string()})


class PlanSource(Datasource):
    """The packs of a rank's streams, in order, for ever; a row is a few packs."""

    def __init__(self, streams: dict[int, Stream], packs_per_row: int):
        self.streams, self.packs_per_row = streams, packs_per_row

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        streams, size = self.streams, self.packs_per_row

        def read() -> Iterator[pa.Table]:
            for packs, states in steps(streams):
                for i in range(0, len(packs), size):
                    text = json.dumps(states) if i + size >= len(packs) else None
                    yield pa.table({"packs": [json.dumps(packs[i : i + size])], "states": [text]}, schema=_PLAN)

        return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


class PackActor:
    """The Ray Data actor that makes the rows of packs."""

    def __init__(self, builder: Any):
        self.builder: PackBuilder = ray.get(builder[0])
        for dataset in self.builder.datasets:
            if isinstance(dataset, Streamed):
                dataset.builder = IsolatedBuilder(dataset.builder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        packs = [[Draw(*draw) for draw in pack] for text in batch.column("packs").to_pylist() for pack in json.loads(text)]
        examples, rejected = zip(*map(self.builder, packs))
        table = schema.encode(examples, [""] * len(packs), [0] * len(packs))
        states = [None] * (len(packs) - 1) + batch.column("states").to_pylist()[-1:]
        table = table.append_column("states", pa.array(states, pa.string()))
        return table.append_column("rejected", pa.array([json.dumps(r, ensure_ascii=False) for r in rejected], pa.string()))


def actor_share(ranks: int, actors: int | None) -> tuple[int, float]:
    """(actors of one rank, CPUs of each): what the cluster has beyond one CPU a rank; on a small machine they share the ranks' cores."""
    free = max(0.0, ray.cluster_resources().get("CPU", 1) - ranks)
    count = actors or max(1, int(free) // ranks)
    return count, max(0.01, min(1.0, round(free / (ranks * count), 2)))


def stream_batches(
    streams: dict[int, Stream], builder: PackBuilder, ranks: int, actors: int | None, max_reject_rate: float
) -> Iterator[tuple[list[dict[str, Any]], States]]:
    """The examples of each of this rank's batches, and the states after it; for ever.

    Raises:
        ConfigError: more than `max_reject_rate` of a source's examples are unusable.
    """
    quiet()
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # every table that an actor returns is a block: rows reach the rank as soon as they are made
    count, cpus = actor_share(ranks, actors)
    per_row = max(1, min(_BLOCK_PACKS, len(streams) // count))
    with ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(PlanSource(streams, per_row), override_num_blocks=1, num_cpus=0).map_batches(
            PackActor,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=count),
            num_cpus=cpus,
            fn_constructor_args=([ray.put(builder)],),
        )
        results = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    rejects = RejectRate(max_reject_rate)
    rows: list[dict[str, Any]] = []
    with reading(results) as tables:
        for table in tables:
            states, rejected = (table.column(name).to_pylist() for name in ("states", "rejected"))
            rejects.add([json.loads(text) for text in rejected])
            rows += schema.decode(table.select(schema.SCHEMA.names))
            if states[-1] is not None:
                yield rows, {int(s): state for s, state in json.loads(states[-1]).items()}
                rows = []


class RejectRate:
    """Counts unusable examples while training."""

    def __init__(self, limit: float):
        self.limit, self.packs = limit, 0
        self.rejected: collections.Counter[str] = collections.Counter()

    def add(self, rejected: list[list[Any]]) -> None:
        """Takes the rejects of each pack; raises ConfigError when there are too many."""
        self.packs += len(rejected)
        for source, row, reason, detail in (r for rejects in rejected for r in rejects):
            self.rejected[source] += 1
            if self.rejected[source] > self.limit * max(self.packs, RATE_FROM_ROWS):
                raise ConfigError(
                    f"{source}: {self.rejected[source]} unusable records in {self.packs} packs, more than data.max_reject_rate="
                    f"{self.limit:g} allows; the last was row {row} ({reason}: {detail})"
                )
