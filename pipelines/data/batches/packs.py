"""From a pack of the plan to the arrays of one training row. Used in the training process and by decode actors alike."""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from molmo_core.preprocessing.packing import pack as join
from pipelines.data import schema
from pipelines.data.batches.plan import Draw, Stream
from pipelines.data.batches.prepared import PreparedDataset
from pipelines.data.builder import example_rng
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.preparation.inventory import Inventory
from pipelines.data.records.fetching import Opened, fetched
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Records

States = dict[int, list[int]]
Reject = tuple[str, int, str, str]
"""(source, row, reason, detail)"""


class Row(NamedTuple):
    """One row of a batch, and what became of the examples of its pack."""

    example: dict[str, Any]
    """They joined; one token without loss if none could be used."""
    tried: dict[str, int]
    """How many there were of each source."""
    rejected: list[Reject]


class Dataset(Protocol):
    """What a plan draws from."""

    def __len__(self) -> int: ...

    def read(self, draw: Draw) -> dict[str, Any]:
        """What `build` takes, media still as references; raises `Rejected`."""
        ...

    def build(self, draw: Draw, example: dict[str, Any]) -> dict[str, Any]:
        """The preprocessed example of a draw; raises `Rejected`."""
        ...

    def measure(self, draw: Draw) -> tuple[int, int]:
        """Its tokens and crops, without decoding."""
        ...

    def where(self, draw: Draw) -> tuple[str, int]:
        """Its source and row."""
        ...


@dataclasses.dataclass
class Prepared:
    """A prepared dataset: the randomness of its examples was fixed when it was made."""

    data: PreparedDataset
    weight: float | None = None
    """Loss weight of every token with loss, in place of what it was prepared with."""

    def __len__(self) -> int:
        return len(self.data)

    def read(self, draw: Draw) -> dict[str, Any]:
        return self.data[draw.row]

    def build(self, draw: Draw, example: dict[str, Any]) -> dict[str, Any]:
        return example if self.weight is None else {**example, "loss_masks": np.float32(self.weight) * (example["loss_masks"] > 0)}

    def measure(self, draw: Draw) -> tuple[int, int]:
        return int(self.data.tokens[draw.row]), int(self.data.crops[draw.row])

    def where(self, draw: Draw) -> tuple[str, int]:
        return str(self.data.folder), draw.row


@dataclasses.dataclass
class Streamed:
    """Records that are decoded when they are drawn, with new randomness each epoch.

    With an inventory, only the records that it calls usable are drawn, and their lengths are known beforehand.
    """

    records: Records
    builder: Any
    """An `ExampleBuilder`, or an `IsolatedBuilder` in decode actors."""
    seed: int
    inventory: Inventory | None = None

    def __len__(self) -> int:
        return len(self.records) if self.inventory is None else len(self.inventory.usable)

    def read(self, draw: Draw) -> dict[str, Any]:
        return self.builder.example(self.records[self._row(draw)])

    def build(self, draw: Draw, example: dict[str, Any]) -> dict[str, Any]:
        return self.builder.build(example, self._rng(draw))

    def measure(self, draw: Draw) -> tuple[int, int]:
        if self.inventory is None:
            raise ValueError("packing streamed records needs their inventory")
        row = self._row(draw)
        return self.builder.measure(self.records.text(row), self.inventory.media(row), self._rng(draw))

    def where(self, draw: Draw) -> tuple[str, int]:
        return self.records.where(self._row(draw))

    def _row(self, draw: Draw) -> int:
        return draw.row if self.inventory is None else int(self.inventory.usable[draw.row])

    def _rng(self, draw: Draw) -> np.random.RandomState:
        return example_rng(self.seed, draw.dataset, draw.epoch, self._row(draw))


class PackBuilder:
    """Makes the arrays of packs.

    Args:
        datasets: in the plan's order.
        limits: tokens and crops of a pack, if examples are packed.
    """

    def __init__(self, datasets: list[Any], limits: tuple[int, int] | None = None):
        self.datasets, self.limits = datasets, limits

    def isolated(self) -> PackBuilder:
        """The same for a process of its own: videos are decoded in a helper process, one for all datasets. Their arrays are valid until
        `release`."""
        streamed = [dataset for dataset in self.datasets if isinstance(dataset, Streamed)]
        builders = iter(IsolatedBuilder.sharing([dataset.builder for dataset in streamed], lend=True))
        made = copy.copy(self)
        made.datasets = [dataclasses.replace(d, builder=next(builders)) if isinstance(d, Streamed) else d for d in self.datasets]
        return made

    def release(self) -> None:
        """The rows of an isolated builder are not needed any more: the next take the place of their videos."""
        for dataset in self.datasets:
            if isinstance(dataset, Streamed) and isinstance(dataset.builder, IsolatedBuilder):
                dataset.builder.release()

    def __call__(self, pack: list[Draw]) -> Row:
        """The row of a pack."""
        return next(self.rows([pack]))

    def rows(self, packs: list[list[Draw]], pool: concurrent.futures.Executor | None = None) -> Iterator[Row]:
        """The rows of some packs. With a pool of threads, remote images are fetched ahead."""
        opened = (self._read(draw) for pack in packs for draw in pack)
        ready = fetched(opened, pool) if pool else opened
        for pack in packs:
            yield self._row(pack, ready)

    def _row(self, pack: list[Draw], ready: Iterator[Opened]) -> Row:
        examples: list[dict[str, Any]] = []
        tried: collections.Counter[str] = collections.Counter()
        rejected: list[Reject] = []
        for draw, opened in zip(pack, ready):
            source, row = self.datasets[draw.dataset].where(draw)
            tried[source] += 1
            try:
                if isinstance(opened, Rejected):
                    raise opened
                example = self.datasets[draw.dataset].build(draw, opened)
                self._check_fits(examples, example)
            except Rejected as reason:
                rejected.append((source, row, reason.reason, reason.detail))
                continue
            examples.append(example)
        if not examples:
            return Row(empty_example(), tried, rejected)
        return Row(join(examples) if self.limits else examples[0], tried, rejected)

    def measure(self, draw: Draw) -> tuple[int, int]:
        """Tokens and crops of a draw, without decoding. One that fits into no pack counts as one token: it is rejected when it is made."""
        tokens, crops = self.datasets[draw.dataset].measure(draw)
        if self.limits is not None and (tokens > self.limits[0] or crops > self.limits[1]):
            return 1, 0
        return tokens, crops

    def _read(self, draw: Draw) -> Opened:
        try:
            return self.datasets[draw.dataset].read(draw)
        except Rejected as reason:
            return reason

    def _check_fits(self, packed: list[dict[str, Any]], example: dict[str, Any]) -> None:
        if self.limits is None:
            return
        tokens, crops = (sum(values) for values in zip(*(schema.size(e) for e in (*packed, example))))
        if tokens > self.limits[0] or crops > self.limits[1]:
            raise Rejected(
                "record: does not fit in its pack",
                f"{tokens:,} tokens and {crops:,} crops or frames; a pack takes {self.limits[0]:,} and {self.limits[1]:,}",
            )


def empty_example() -> dict[str, Any]:
    """A row of one token and no loss: takes the place of a pack whose examples are all unusable."""
    one = np.zeros(1, np.int64)
    return {"input_ids": one, "labels": one - 1, "loss_masks": np.zeros(1, np.float32), "position_ids": one, "metadata": {}}


def steps(streams: Mapping[int, Stream]) -> Iterator[tuple[list[list[Draw]], States]]:
    """One pack of every stream, and the states afterwards; for ever."""
    while True:
        packs = [stream.next() for stream in streams.values()]
        yield packs, {s: stream.state() for s, stream in streams.items()}
