"""The batches of a training run: this rank's share of every global batch, in an order that can be resumed on any number of ranks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from molmo_core.config import ConfigError
from pipelines.data import mixture
from pipelines.data.config import DataConfig, DatasetConfig
from pipelines.data.plan import Draw, Plan, Stream
from pipelines.data.prepared import PreparedDataset

if TYPE_CHECKING:
    from molmo_core.models.base import BaseModelConfig

States = dict[int, list[int]]


class TrainLoader:
    """Iterating gives this rank's collated batches for ever (torch tensors on the CPU, keys as the collator's).

    The global batch has one pack from each of `global_batch_size` logical streams; rank r owns a contiguous part of them, so the ranks'
    batches one after the other are the same global batch for any `world_size`.

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
        self.data = data
        groups = data.all_groups()
        self.names = [name for group in groups.values() for name in group.datasets]
        self.configs: list[DatasetConfig] = [config for group in groups.values() for config in group.datasets.values()]
        self.datasets = [_open(name, config, sequence_length) for name, config in zip(self.names, self.configs)]
        sizes = {name: len(dataset) for name, dataset in zip(self.names, self.datasets)}
        rates = mixture.rates(groups, sizes)
        self.plan = Plan(list(sizes.values()), [rates[n] for n in self.names], seed, global_batch_size, data.shuffle)
        self.owned = np.array_split(np.arange(global_batch_size), world_size)[rank].tolist()
        self.streams = {s: Stream(self.plan, s) for s in self.owned}
        self.collate = cast(Any, model).build_collator(sequence_length, "to_max" if data.pad_to_max else None, include_metadata=False)
        self._states = {s: stream.state() for s, stream in self.streams.items()}

    def __len__(self) -> int:
        """Optimiser steps of one pass over as many examples as all datasets together have (unpacked)."""
        return max(1, sum(self.plan.sizes) // self.plan.num_streams)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches from the current state on; `data.prefetch` of them are made ahead in a thread."""
        for stream, state in self._states.items():
            self.streams[stream].restore(state)
        for batch, states in prefetched(self._batches(), self.data.prefetch):
            self._states = states
            yield batch

    def state_dict(self) -> States:
        """State of the rank's own streams after the batch last yielded."""
        return {s: list(state) for s, state in self._states.items()}

    def load_state_dict(self, states: States) -> None:
        """Continues from the merged `state_dict`s of all ranks of a run, whatever their number was. Takes effect at the next `iter`."""
        states = {int(s): state for s, state in states.items()}
        if missing := [s for s in self.owned if s not in states]:
            raise ConfigError(f"the checkpoint has no data state of streams {missing}: merge the states of all its ranks")
        for stream in self.owned:
            self.streams[stream].restore(states[stream])
        self._states = {s: list(states[s]) for s in self.owned}

    def _batches(self) -> Iterator[tuple[dict[str, Any], States]]:
        while True:
            packs = {s: stream.next() for s, stream in self.streams.items()}
            states = {s: stream.state() for s, stream in self.streams.items()}
            yield self.collate([self._example(pack) for pack in packs.values()]), states

    def _example(self, pack: list[Draw]) -> dict[str, Any]:
        (draw,) = pack
        return weighted(self.datasets[draw.dataset][draw.row], self.configs[draw.dataset].message_weight)


def weighted(example: dict[str, Any], weight: float | None) -> dict[str, Any]:
    """The example with every weighted token at `weight` (None = as it is)."""
    return example if weight is None else {**example, "loss_masks": np.float32(weight) * (example["loss_masks"] > 0)}


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


def _open(name: str, config: DatasetConfig, sequence_length: int) -> PreparedDataset:
    dataset = PreparedDataset(config.path)
    if longer := int((dataset.tokens > sequence_length).sum()):
        raise ConfigError(
            f"dataset {name!r}: {longer:,} examples are longer than sequence_length={sequence_length} (longest {dataset.tokens.max():,}); "
            "raise it, or prepare them with this sequence_length"
        )
    return dataset
