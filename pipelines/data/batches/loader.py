"""The batches of a training run: this rank's share of every global batch, in an order that can be resumed on any number of ranks."""

from __future__ import annotations

import dataclasses
import queue
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from molmo_core.config import ConfigError
from molmo_core.preprocessing.collator import MMCollator, tensors
from molmo_core.preprocessing.packing import Packer
from pipelines.data.batches import mixture
from pipelines.data.batches.packs import PackBuilder, Prepared, States, Streamed, steps
from pipelines.data.batches.plan import Draw, Plan, Stream
from pipelines.data.batches.prepared import PreparedDataset, reads_prepared
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import MAX_IMAGE_PIXELS, DataConfig, DatasetConfig
from pipelines.data.preparation.inventory import Inventory, inventory_path
from pipelines.data.sources import open_records

if TYPE_CHECKING:
    from molmo_core.registry import BaseModelConfig


# Streamed batches are read-only memory of the object store; torch has no read-only tensors.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


class TrainLoader:
    """Iterating gives this rank's collated batches for ever (torch tensors on the CPU, not to be written to; keys as the collator's).

    The global batch has one pack from each of `global_batch_size` logical streams; rank r owns a contiguous part of them, so the ranks'
    batches one after the other are the same global batch for any `world_size`. Prepared datasets are read in this process; if any
    dataset is records, a Ray Data pipeline of this rank decodes and preprocesses (Ray must be connected).

    Args:
        data: what to read.
        model: its preprocessor and collator are used.
        global_batch_size: packs of one optimiser step, over all ranks.
        sequence_length: longest pack in tokens.
        seed: of the order and of all randomness of the examples.
        rank, world_size: which share is this process's.

    Raises:
        ConfigError: data that cannot be read or do not fit, or more ranks than packs.
    """

    def __init__(
        self, data: DataConfig, model: BaseModelConfig, global_batch_size: int, sequence_length: int, seed: int, rank: int, world_size: int
    ):
        if world_size > global_batch_size:
            raise ConfigError(f"{world_size} workers for a global batch of {global_batch_size}: every worker needs at least one row")
        self.data, self.world_size = data, world_size
        groups = data.all_groups()
        configs = {name: config for group in groups.values() for name, config in group.datasets.items()}
        datasets = {name: open_dataset(name, config, data, model, sequence_length, seed) for name, config in configs.items()}
        self.streamed = any(isinstance(dataset, Streamed) for dataset in datasets.values())
        self.datasets = tuple(datasets)
        """Their names."""
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        rates = mixture.rates(groups, sizes)
        self.plan = Plan(list(sizes.values()), [rates[name] for name in sizes], seed, global_batch_size, data.shuffle)
        limits = (sequence_length, data.packing.max_crops) if data.packing else None
        self.builder = PackBuilder(list(datasets.values()), limits)
        self.owned = np.array_split(np.arange(global_batch_size), world_size)[rank].tolist()
        self.collate: MMCollator = cast(Any, model).build_collator(
            sequence_length, "to_max" if data.pad_to_max else None, include_metadata=False
        )
        self._states = {s: stream.state() for s, stream in self.streams().items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches from the current state on; `data.prefetch` of them are made ahead in a thread."""
        streams = self.streams()
        for number, state in self._states.items():
            streams[number].restore(state)
        if self.streamed:
            from pipelines.data.batches.stream import stream_batches

            batches = stream_batches(streams, self.builder, self.collate, self.world_size, self.data.actors, self.data.max_reject_rate)
        else:
            batches = ((self.collate.arrays([self.builder(pack).example for pack in packs]), states) for packs, states in steps(streams))
        for batch, states in prefetched(batches, self.data.prefetch):
            self._states = states
            yield tensors(batch)

    def examples(self, count: int) -> list[dict[str, Any]]:
        """This rank's first `count` rows in the order in which they are trained on, not collated, made in this process (for looking at)."""
        streams = list(self.streams().values())
        return [self.builder(streams[k % len(streams)].next()).example for k in range(count)]

    def state_dict(self) -> States:
        """State of the rank's own streams after the batch last yielded."""
        return {s: list(state) for s, state in self._states.items()}

    def names(self, states: States) -> list[str]:
        """Names the examples of the rank's batch that follows on `states` (`state_dict` before it), as `dataset[row]`."""
        streams = self.streams()
        for number, state in states.items():
            streams[number].restore(state)
        return [f"{self.datasets[draw.dataset]}[{draw.row}]" for number in states for draw in streams[number].next()]

    def load_state_dict(self, states: States) -> None:
        """Continues from the merged `state_dict`s of all ranks of a run, whatever their number was. Takes effect at the next `iter`."""
        states = {int(s): state for s, state in states.items()}
        if missing := [s for s in self.owned if s not in states]:
            raise ConfigError(f"the checkpoint has no data state of streams {missing}: merge the states of all its ranks")
        for number, stream in self.streams().items():
            stream.restore(states[number])
        self._states = {s: list(states[s]) for s in self.owned}

    def streams(self) -> dict[int, Stream]:
        """New walks through this rank's streams, from their beginning."""
        return {s: Stream(self.plan, s, self._packer(), self.builder.measure) for s in self.owned}

    def _packer(self) -> Packer[Draw] | None:
        limits, packing = self.builder.limits, self.data.packing
        return Packer(*limits, buffer_size=packing.buffer_size) if limits and packing else None


def open_dataset(
    name: str, config: DatasetConfig, data: DataConfig, model: BaseModelConfig, sequence_length: int, seed: int
) -> Prepared | Streamed:
    """Opens one dataset of a training run.

    Raises:
        ConfigError: unreadable, or examples that are longer than `sequence_length`.
    """
    if reads_prepared(config):
        prepared = PreparedDataset(config.path)
        if longer := int((prepared.tokens > sequence_length).sum()):
            raise ConfigError(
                f"dataset {name!r}: {longer:,} examples are longer than sequence_length={sequence_length} "
                f"(longest {prepared.tokens.max():,}); raise it, or prepare them with this sequence_length"
            )
        if data.packing and (more := int((prepared.crops > data.packing.max_crops).sum())):
            raise ConfigError(
                f"dataset {name!r}: {more:,} examples have more crops or frames than packing.max_crops={data.packing.max_crops} "
                f"(most {prepared.crops.max():,}); raise it, or prepare them with fewer"
            )
        return Prepared(prepared, config.message_weight)
    records = open_records(config.path, config.format)
    changed = cast(Any, with_overrides(model, config.overrides, name))
    preprocessor = changed.build_preprocessor(for_inference=False, is_training=True, max_seq_len=sequence_length)
    inventory = Inventory(records, inventory_path(config.path)) if data.packing else None
    # As in the published recipes: a weight of its own comes without the model's weighting; that of an annotation stays a factor.
    weight = {"weight": config.message_weight, "root_subsegments": False, "root_length": False}
    defaults = {} if config.message_weight is None else {"message_weight": weight}
    return Streamed(records, ExampleBuilder(preprocessor, MAX_IMAGE_PIXELS, defaults), seed, inventory)


def with_overrides(model: BaseModelConfig, overrides: dict[str, Any], name: str) -> BaseModelConfig:
    """The model configuration with other settings of its `mm_preprocessor`."""
    if not overrides:
        return model
    settings = cast(Any, model).mm_preprocessor
    changed = type(settings).from_dict({**settings.as_dict(), **overrides}, source=f"data: dataset {name!r}, overrides")
    return dataclasses.replace(cast(Any, model), mm_preprocessor=changed)


def prefetched(items: Iterator[Any], size: int) -> Iterator[Any]:
    """The same items, made ahead in a thread; its errors are raised here, and it ends with this iterator."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(max(1, size))
    stop = threading.Event()

    def put(entry: tuple[Any, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=produce, name="data-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
