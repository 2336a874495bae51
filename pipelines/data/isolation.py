"""Videos are decoded in a process of their own: a file that crashes or hangs a decoder costs one record, and leaks end with the process.

Ray restarts an actor that dies and gives it the same work again, so one file that always kills the decoder would be tried for
ever. Here the decode actor hands each video to a helper process (`pipelines.worker_process`) and survives it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.data.builder import ExampleBuilder
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record
from pipelines.worker_process import WorkerProcess

TIMEOUT_S = 600.0
VIDEOS_PER_PROCESS = 500
_ATTEMPTS = 2  # a process may also be killed because the machine is out of memory


class IsolatedBuilder:
    """An `ExampleBuilder` whose videos are decoded in a helper process.

    Args:
        builder: does the work, there and here.
        timeout_s, videos_per_process, lend: see `VideoDecoder`.
    """

    def __init__(
        self,
        builder: ExampleBuilder,
        timeout_s: float = TIMEOUT_S,
        videos_per_process: int = VIDEOS_PER_PROCESS,
        lend: bool = False,
    ):
        self.builder, self._number = builder, 0
        self.decoder = VideoDecoder([builder], timeout_s, videos_per_process, lend)

    @classmethod
    def sharing(cls, builders: Sequence[ExampleBuilder], lend: bool = False) -> list[IsolatedBuilder]:
        """The same for several builders, with one helper process for all of them."""
        made = [cls(builder) for builder in builders]
        decoder = VideoDecoder(builders, lend=lend)
        for number, one in enumerate(made):
            one.decoder, one._number = decoder, number
        return made

    def __call__(self, record: Record, rng: np.random.RandomState) -> dict[str, Any]:
        """The preprocessed example; raises `Rejected`, also for a video that crashes its decoder or takes too long."""
        return self.build(self.example(record), rng)

    def example(self, record: Record, counts: Counter[str] | None = None) -> dict[str, Any]:
        """As the builder's."""
        return self.builder.example(record, counts)

    def build(self, example: dict[str, Any], rng: np.random.RandomState | None) -> dict[str, Any]:
        """As the builder's, but for videos."""
        return self.decoder.build(self._number, example, rng) if "video" in example else self.builder.build(example, rng)

    def release(self) -> None:
        """The arrays that were lent are not needed any more: the next take their place."""
        self.decoder.release()

    def close(self) -> None:
        """Ends the helper process; the next video starts another."""
        self.decoder.close()


class VideoDecoder:
    """The helper process of some builders.

    Args:
        builders: what it works with.
        timeout_s: longest time for one video.
        videos_per_process: then the process is replaced.
        lend: the arrays of videos are read-only views of the memory in which the process leaves them, valid until `release`; else copies.
    """

    def __init__(
        self,
        builders: Sequence[ExampleBuilder],
        timeout_s: float = TIMEOUT_S,
        videos_per_process: int = VIDEOS_PER_PROCESS,
        lend: bool = False,
    ):
        self.builders, self.timeout_s, self.videos_per_process, self.lend = list(builders), timeout_s, videos_per_process, lend
        self._helper: WorkerProcess | None = None
        self._count = 0

    def build(self, number: int, example: dict[str, Any], rng: np.random.RandomState | None) -> dict[str, Any]:
        """What builder `number` makes of an example with a video; raises `Rejected`."""
        for _ in range(_ATTEMPTS):
            helper = self._process()
            try:
                result = helper.call(number, example, rng, timeout_s=self.timeout_s, lend=self.lend)
            except TimeoutError:
                self.close()
                raise Rejected("video: takes too long to decode", f"{_name(example)}: more than {self.timeout_s:g} s") from None
            except (EOFError, OSError):
                ended = helper.end()
                self._helper = None
                continue
            if isinstance(result, Rejected):
                raise result
            return result
        raise Rejected("video: crashes the decoder", f"{_name(example)}: the process died {_ATTEMPTS} times ({ended})")

    @property
    def lent(self) -> int:
        """Bytes that are lent, and the gaps between them."""
        return self._helper.lent if self._helper else 0

    def release(self) -> None:
        """The arrays that were lent are not needed any more: the next take their place."""
        if self._helper is not None:
            self._helper.lent = 0

    def close(self) -> None:
        """Ends the helper process; the next video starts another."""
        if self._helper is not None:
            self._helper.end()
        self._helper = None

    def _process(self) -> WorkerProcess:
        if self._count >= self.videos_per_process:
            self.close()
        if self._helper is None:
            self._helper, self._count = WorkerProcess(_Work(self.builders), "video decoder"), 0
        self._count += 1
        return self._helper


@dataclasses.dataclass
class _Work:
    """What the helper process does."""

    builders: list[ExampleBuilder]

    def __call__(self, number: int, example: dict[str, Any], rng: np.random.RandomState | None) -> dict[str, Any] | Rejected:
        try:
            return self.builders[number].build(example, rng)
        except Rejected as reason:
            return reason


def _name(example: dict[str, Any]) -> str:
    video = example["video"]
    return video if isinstance(video, str) else f"video of {len(video):,} bytes"
