"""Streamed training data: a Ray Data pipeline a rank, plan → decode, preprocess and collate actors → batches in the plan's order.

The plan is the source: a read task that goes through the rank's streams and emits the packs of some steps, as fast as the actors
take them. Actors are stateless, Ray Data keeps the order, and the states travel with the batches, so nothing has to be remembered
anywhere else. Media are decoded inside the actor that preprocesses them: raw pixels never cross the object store. Batches are
collated there, too: what the object store holds is what the rank trains on, which does not copy it (blocks.py).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata

from molmo_core.preprocessing.collator import MMCollator
from pipelines.cluster import quiet, reading
from pipelines.data.batches import blocks, endless
from pipelines.data.batches.blocks import BlockWriter, Part
from pipelines.data.batches.packs import PackBuilder, Reject, States, steps
from pipelines.data.batches.plan import Draw, Stream
from pipelines.data.records.fetching import THREADS
from pipelines.data.rejects import Rejects

_PLAN = pa.schema({"packs": pa.list_(pa.string()), "states": pa.list_(pa.string())})


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the work is cut. The batches do not depend on it."""

    call_packs: int = 32
    """Packs that an actor makes in one call: Ray Data's cost is one of calls and blocks."""
    block_bytes: int = 64 << 20
    """Of a block: large, but small beside Ray Data's share of the object store."""
    pipeline_calls: int = 50_000
    """Calls of one pipeline. Then a new one, with new actors, takes over: what a decoder, an actor or Ray Data itself leaks ends."""


class PlanSource(Datasource):
    """The packs of a rank's streams, in order; a row is what an actor makes in one call: whole steps, or a part of a large one. The
    last pack of a step comes with the states after it, and the last row ends a step."""

    def __init__(self, streams: dict[int, Stream], sizes: Sizes):
        self.streams, self.sizes = streams, sizes

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def rows(self) -> Iterator[pa.Table]:
        """Tables of one row."""
        most, calls = self.sizes.call_packs, 0
        waiting: list[tuple[str, str | None]] = []
        for packs, states in steps(self.streams):
            waiting += [(json.dumps(pack), None) for pack in packs[:-1]] + [(json.dumps(packs[-1]), json.dumps(states))]
            while len(waiting) >= most:
                size = most if len(waiting) >= 2 * most else len(waiting)
                row, waiting = waiting[:size], waiting[size:]
                yield pa.table({"packs": [[pack for pack, _ in row]], "states": [[state for _, state in row]]}, schema=_PLAN)
                calls += 1
            if calls >= self.sizes.pipeline_calls and not waiting:
                return

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        return [ReadTask(self.rows, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


class BatchMaker:
    """Makes the rows of packs, and of them blocks with the batches of steps."""

    def __init__(self, builder: PackBuilder, collate: MMCollator, sizes: Sizes):
        self.builder, self.collate, self.sizes = builder.isolated(), collate, sizes
        self.writer = BlockWriter()
        self.pool = concurrent.futures.ThreadPoolExecutor(THREADS)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            yield from self._blocks([[Draw(*draw) for draw in json.loads(pack)] for pack in row["packs"]], row["states"])

    def _blocks(self, packs: list[list[Draw]], states: list[str | None]) -> Iterator[pa.Table]:
        examples: list[dict[str, Any]] = []
        tried: collections.Counter[str] = collections.Counter()
        rejected: list[Reject] = []
        size = 0
        for number, (made, state) in enumerate(zip(self.builder.rows(packs, self.pool), states), 1):
            examples.append(made.example)
            tried.update(made.tried)
            rejected += made.rejected
            size += sum(value.nbytes for value in made.example.values() if isinstance(value, np.ndarray))
            ends = state is not None  # better here than in the middle of a step, whose parts the rank has to join
            full = size >= self.sizes.block_bytes // (2 if ends else 1) or number == len(packs)
            if ends or full:
                arrays = self.collate.arrays(examples, self.writer.empty)
                self.writer.add(Part(arrays, tried, rejected, json.loads(state) if state else None))
                examples, tried, rejected = [], collections.Counter(), []
                self.builder.release()  # the batch is a copy
            if full:
                yield self.writer.table()
                size = 0


class BatchActor(BatchMaker):
    """The Ray Data actor: the same, with a builder from the object store."""

    def __init__(self, builder: list[ray.ObjectRef], collate: MMCollator, sizes: Sizes):
        super().__init__(ray.get(builder[0]), collate, sizes)


def actor_share(cpus: float, ranks: int, actors: int | None = None) -> tuple[int, float]:
    """(actors of one rank, CPUs that each reserves): one for every CPU that a cluster of so many has beyond one a rank.

    They reserve half of that, so that the pipeline of a validation finds room beside that of the training.
    """
    free = max(0.0, cpus - ranks)
    count = actors or max(1, int(free) // ranks)
    return count, min(0.5, int(50 * free / (ranks * count)) / 100)


def stream_batches(
    streams: dict[int, Stream],
    builder: PackBuilder,
    collate: MMCollator,
    ranks: int,
    actors: int | None,
    max_reject_rate: float,
    sizes: Sizes = Sizes(),
) -> Iterator[tuple[dict[str, Any], States]]:
    """This rank's batches, and the states after each; for ever.

    The arrays of a batch are read-only and may be in the object store, which keeps them until they are deleted.

    Raises:
        TooManyRejected: more than `max_reject_rate` of a source's examples, or of all, are unusable.
    """
    quiet()
    rejects = Rejects(max_reject_rate, "data.max_reject_rate")
    reference = ray.put(builder)
    while True:
        count, cpus = actor_share(ray.cluster_resources().get("CPU", 1), ranks, actors)
        arrays: list[dict[str, Any]] = []
        with reading(_blocks(streams, reference, collate, count, cpus, sizes)) as made:
            for part in (part for block in made for part in blocks.read(block)):
                rejects.add(part.tried, part.rejected)
                rejects.check()
                arrays.append(part.arrays)
                if part.states is not None:
                    after = part.states
                    yield collate.join(arrays), after
                    arrays = []
        for stream, state in after.items():
            streams[stream].restore(state)


def _blocks(
    streams: dict[int, Stream], builder: ray.ObjectRef, collate: MMCollator, actors: int, cpus: float, sizes: Sizes
) -> Iterable[pa.Table]:
    """The blocks of a pipeline that starts where the streams are."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # what an actor gives is not collected into larger blocks: it reaches the rank at once
    if endless.internals() is None:
        sizes = dataclasses.replace(sizes, pipeline_calls=min(sizes.pipeline_calls, endless.PLAIN_ROWS))
    with ray.data.DataContext.current(context):
        dataset = endless.read(PlanSource(streams, sizes), max(8, 2 * actors), context).map_batches(
            BatchActor,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=cpus,
            fn_constructor_args=([builder], collate, sizes),
        )
        # The loader looks ahead itself. Blocks that Ray Data kept back for it would count against its share of the object store, and
        # with large ones (videos, a small store) no task could start that makes the block it waits for.
        return dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
