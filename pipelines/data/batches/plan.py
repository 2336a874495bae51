"""The order of examples as a function: (configuration, seed, stream, position) → the next pack.

A global batch takes one pack from each of a fixed number of logical streams (as many as the global batch has packs). A stream knows
nothing of ranks, workers or actors, so the batches do not depend on their number. Within a dataset, all streams together walk through
one permutation an epoch: draw c of stream s is place s + c·streams of the concatenated epochs, so no example is left out or
repeated within an epoch. What has to be remembered is a few integers a stream: how many draws, from which dataset, and what waits in
the packer's buffer.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from molmo_core.config import ConfigError
from molmo_core.preprocessing.packing import Packer, Waiting

_BLOCK = 1024
_CHOICE, _ORDER = 1, 2  # tags that keep the random sequences apart


class Draw(NamedTuple):
    """One example of a pack; (seed, dataset, epoch, row) decides its randomness."""

    dataset: int
    row: int
    epoch: int


class Plan:
    """What all streams share: sizes, rates, seed.

    Args:
        sizes: examples of each dataset.
        rates: probability of each dataset.
        seed: of the order.
        num_streams: packs of a global batch.
        shuffle: False walks through each dataset in its own order.
    """

    def __init__(self, sizes: Sequence[int], rates: Sequence[float], seed: int, num_streams: int, shuffle: bool = True):
        self.sizes, self.seed, self.num_streams, self.shuffle = list(map(int, sizes)), seed, num_streams, shuffle
        self.rates = np.asarray(rates, np.float64) / np.sum(rates)
        self._permutation = functools.lru_cache(2 * len(self.sizes))(self._permute)

    def dataset(self, stream: int, position: int) -> int:
        """Which dataset draw number `position` of a stream comes from: independent draws by rate."""
        return 0 if len(self.sizes) == 1 else int(self._choices(stream, position // _BLOCK)[position % _BLOCK])

    def draw(self, dataset: int, stream: int, count: int) -> Draw:
        """The example that is draw number `count` of a stream from a dataset."""
        epoch, place = divmod(stream + count * self.num_streams, self.sizes[dataset])
        return Draw(dataset, int(self._permutation(dataset, epoch)[place]) if self.shuffle else place, epoch)

    def fingerprint(self, *settings: Any) -> int:
        """A number that two plans share only if their order is the same."""
        text = json.dumps([self.sizes, [round(r, 9) for r in self.rates], self.seed, self.num_streams, self.shuffle, *settings])
        return zlib.crc32(text.encode())

    def _permute(self, dataset: int, epoch: int) -> np.ndarray:
        seed = np.random.SeedSequence([self.seed, _ORDER, dataset, epoch])
        return np.random.Generator(np.random.PCG64(seed)).permutation(self.sizes[dataset])

    @functools.lru_cache(512)  # noqa: B019  (a plan lives as long as its process)
    def _choices(self, stream: int, block: int) -> np.ndarray:
        seed = np.random.SeedSequence([self.seed, _CHOICE, stream, block])
        return np.random.Generator(np.random.PCG64(seed)).choice(len(self.rates), _BLOCK, p=self.rates)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_permutation"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._permutation = functools.lru_cache(2 * len(self.sizes))(self._permute)


class Stream:
    """One logical stream of packs. `state` is a list of integers, `restore` takes it back.

    Args:
        plan: what all streams share.
        number: which stream this is.
        packer: groups examples into packs; None = every example is a pack.
        measure: tokens and crops of a draw (needed with a packer).
    """

    def __init__(
        self, plan: Plan, number: int, packer: Packer[Draw] | None = None, measure: Callable[[Draw], tuple[int, int]] | None = None
    ):
        if packer is not None and measure is None:
            raise ValueError("a packer needs the lengths of the examples: give measure")
        self.plan, self.number, self.packer, self.measure = plan, number, packer, measure
        settings = (packer.max_tokens, packer.max_crops, packer.buffer_size, packer.max_passed) if packer else ()
        self.fingerprint = plan.fingerprint(*settings)
        self.position = 0
        self.counts = [0] * len(plan.sizes)

    def next(self) -> list[Draw]:
        """The next pack."""
        if self.packer is None or self.measure is None:
            return [self._draw()]
        while True:
            draw = self._draw()
            if (pack := self.packer.add(draw, *self.measure(draw))) is not None:
                return pack

    def _draw(self) -> Draw:
        dataset = self.plan.dataset(self.number, self.position)
        draw = self.plan.draw(dataset, self.number, self.counts[dataset])
        self.position += 1
        self.counts[dataset] += 1
        return draw

    def state(self) -> list[int]:
        """What `restore` needs to continue here: the draws made, and the examples that wait in the packer."""
        waiting = [n for w in self.packer.buffer for n in (*w.item, w.passed)] if self.packer else []
        return [self.fingerprint, self.position, *self.counts, *waiting]

    def restore(self, state: Sequence[int]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: the state is of another order (other data, seed, mixture, packing or batch size).
        """
        if not state or state[0] != self.fingerprint:
            raise ConfigError(
                "the checkpoint's data order is of other data, or of another mixture, seed, packing or global batch size: "
                "use the same, or start a new run from its weights"
            )
        end = 2 + len(self.counts)
        self.position, self.counts = state[1], list(state[2:end])
        if self.packer is not None and self.measure is not None:
            waiting = [(Draw(*state[i : i + 3]), state[i + 3]) for i in range(end, len(state), 4)]
            self.packer.buffer = [Waiting(draw, *self.measure(draw), passed) for draw, passed in waiting]
