"""Streamed training data: a Ray Data pipeline a rank, plan → decode, preprocess and collate actors → batches in the plan's order.

The plan is the source: a read task that goes through the rank's streams and emits the packs of some steps, as fast as the actors
take them. Actors are stateless, Ray Data keeps the order, and the states travel with the batches, so nothing has to be remembered
anywhere else. Media are decoded inside the actor that preprocesses them: raw pixels never cross the object store. Batches are
collated there, too: what the object store holds is what the rank trains on, which does not copy it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata

from molmo_core.preprocessing.collator import MMCollator
from pipelines.cluster import quiet, reading
from pipelines.data import schema
from pipelines.data.batches import endless
from pipelines.data.batches.arena import Arena
from pipelines.data.batches.packs import PackBuilder, Reject, States, Streamed, steps
from pipelines.data.batches.plan import Draw, Stream
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.records.fetching import THREADS
from pipelines.data.rejects import Rejects

# Ray Data's cost is one of calls and blocks: large ones, but small beside its share of the object store.
_CALL_PACKS = 32
_BLOCK_BYTES = 64 << 20
_LARGE_BYTES = 1 << 20
_LARGE_ARRAYS = 8
# Then a new pipeline, with new actors, goes on: what a decoder, an actor or Ray Data itself leaks ends with them.
_PIPELINE_BLOCKS = 50_000
_BLOCK = pa.schema({"pickled": pa.binary(), **{f"large{i}": pa.large_binary() for i in range(_LARGE_ARRAYS)}})
_PLAN = pa.schema({"packs": pa.list_(pa.string()), "states": pa.list_(pa.string())})

Made = tuple[dict[str, Any], dict[str, int], list[Reject], str | None]
"""(some rows of a step's batch as numpy arrays, how many examples of each source were tried, which of them were rejected, the states
after the step if they end it)"""


class PlanSource(Datasource):
    """The packs of a rank's streams, in order, for ever; a row is what an actor makes in one call: whole steps, or a part of a large
    one. The last pack of a step comes with the states after it."""

    def __init__(self, streams: dict[int, Stream]):
        self.streams = streams

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        streams = self.streams

        def read() -> Iterator[pa.Table]:
            waiting: list[tuple[str, str | None]] = []
            for packs, states in steps(streams):
                waiting += [(json.dumps(pack), None) for pack in packs[:-1]] + [(json.dumps(packs[-1]), json.dumps(states))]
                while len(waiting) >= _CALL_PACKS:
                    size = _CALL_PACKS if len(waiting) >= 2 * _CALL_PACKS else len(waiting)
                    row, waiting = waiting[:size], waiting[size:]
                    yield pa.table({"packs": [[pack for pack, _ in row]], "states": [[state for _, state in row]]}, schema=_PLAN)

        return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


class BatchActor:
    """The Ray Data actor that makes the rows of packs, and of them the batches of steps."""

    def __init__(self, builder: Any, collate: MMCollator):
        self.builder: PackBuilder = ray.get(builder[0])
        self.collate, self.arena = collate, Arena()
        self.pool = concurrent.futures.ThreadPoolExecutor(THREADS)
        for dataset in self.builder.datasets:
            if isinstance(dataset, Streamed):
                dataset.builder = IsolatedBuilder(dataset.builder, lend=True)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            packs = [[Draw(*draw) for draw in json.loads(pack)] for pack in row["packs"]]
            made: list[Made] = []
            examples: list[dict[str, Any]] = []
            tried: collections.Counter[str] = collections.Counter()
            rejects: list[Reject] = []
            size = 0
            for number, ((example, of, rejected), states) in enumerate(zip(self.builder.rows(packs, self.pool), row["states"]), 1):
                examples.append(example)
                tried.update(of)
                rejects += rejected
                size += sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))
                ends = states is not None  # better here than in the middle of a step, whose parts the rank has to join
                full = size >= (_BLOCK_BYTES // 2 if ends else _BLOCK_BYTES) or number == len(row["packs"])
                if ends or full:
                    made.append((self.collate.arrays(examples, self.arena.empty), dict(tried), rejects, states))
                    examples, rejects = [], []
                    tried.clear()
                    self._release()  # the batch is a copy
                if full:
                    yield _block(made)
                    made, size = [], 0
                    self.arena.next_block()

    def _release(self) -> None:
        for dataset in self.builder.datasets:
            if isinstance(dataset, Streamed):
                dataset.builder.release()


def _block(made: list[Made]) -> pa.Table:
    """One row of a table: a pickle, and beside it large arrays (the pixels), a column each and not copied.

    Ray Data cuts its blocks between rows, down to single ones, and each block, and each column of it, costs CPU time in the actor and
    again in the rank: with a column for each array of an example a tenth of what it takes to make the examples.
    """
    large: list[pa.LargeBinaryArray] = []

    def inside(buffer: pickle.PickleBuffer) -> bool:
        array = np.frombuffer(buffer.raw(), np.uint8)
        if array.nbytes < _LARGE_BYTES or len(large) == _LARGE_ARRAYS:
            return True
        ends = np.array([0, array.nbytes])
        large.append(pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(array)]))
        return False

    pickled = pickle.dumps(made, protocol=5, buffer_callback=inside)
    return pa.table([pa.array([pickled], pa.binary()), *large, *[pa.nulls(1, pa.large_binary())] * (_LARGE_ARRAYS - len(large))], _BLOCK)


def _unpack(block: pa.Table) -> Iterator[Made]:
    """What `_block` was given, its large arrays as views; a block may hold several of its rows."""
    for batch in block.to_batches():
        pickled, *columns = batch.columns
        for pickle_, *large in zip(pickled.to_pylist(), *map(schema.views, columns)):
            yield from pickle.loads(pickle_, buffers=large)


def actor_share(cpus: float, ranks: int, actors: int | None = None) -> tuple[int, float]:
    """(actors of one rank, CPUs that each reserves): one for every CPU that a cluster of so many has beyond one a rank.

    They reserve half of that, so that the pipeline of a validation finds room beside that of the training.
    """
    free = max(0.0, cpus - ranks)
    count = actors or max(1, int(free) // ranks)
    return count, min(0.5, int(50 * free / (ranks * count)) / 100)


def stream_batches(
    streams: dict[int, Stream], builder: PackBuilder, collate: MMCollator, ranks: int, actors: int | None, max_reject_rate: float
) -> Iterator[tuple[dict[str, Any], States]]:
    """This rank's batches, and the states after each; for ever.

    The arrays of a batch are read-only and may lie in the object store, which keeps them until they are deleted.

    Raises:
        ConfigError: more than `max_reject_rate` of a source's examples are unusable.
    """
    quiet()
    rejects = Rejects(max_reject_rate, "data.max_reject_rate")
    reference = ray.put(builder)
    while True:
        parts: list[dict[str, Any]] = []
        with reading(_blocks(streams, reference, collate, *actor_share(ray.cluster_resources().get("CPU", 1), ranks, actors))) as blocks:
            for number, (part, tried, rejected, states) in ((n, made) for n, block in enumerate(blocks, 1) for made in _unpack(block)):
                rejects.add(tried, rejected)
                rejects.check()
                parts.append(part)
                if states is not None:
                    after = {int(stream): state for stream, state in json.loads(states).items()}
                    yield collate.join(parts), after
                    parts = []
                    if number >= _PIPELINE_BLOCKS:
                        break
        for stream, state in after.items():
            streams[stream].restore(state)


def _blocks(streams: dict[int, Stream], builder: ray.ObjectRef, collate: MMCollator, actors: int, cpus: float) -> Iterable[pa.Table]:
    """The blocks of a pipeline that starts where the streams are."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # what an actor gives is not collected into larger blocks: it reaches the rank at once
    rows_ahead = max(8, 2 * actors)
    endless.configure(context, rows_ahead)
    with ray.data.DataContext.current(context):
        dataset = endless.read(PlanSource(streams), rows_ahead).map_batches(
            BatchActor,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=cpus,
            fn_constructor_args=([builder], collate),
        )
        # The loader looks ahead itself. Blocks that Ray Data kept back for it would count against its share of the object store, and
        # with large ones (videos, a small store) no task could start that makes the block it waits for.
        return dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
