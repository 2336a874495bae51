"""Videos are decoded in a process of their own: a file that crashes or hangs a decoder costs one record, and leaks end with the process.

Ray restarts an actor that dies and gives it the same work again, so one file that always kills the decoder would be tried for
ever. Here the decode actor hands each video to a helper process and survives it. Pixels come back through memory that both map: a
Ray actor as the helper would send them through the object store, which took a tenth of a clip's CPU time (16 frames of 640 x 360).
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from pipelines.data.builder import ExampleBuilder
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record

TIMEOUT_S = 600.0
VIDEOS_PER_PROCESS = 500
START_TIMEOUT_S = 120.0
_ALIGNED, _GROWTH = 64, 16 << 20  # bytes
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
        self._helper: _Helper | None = None
        self._count = 0

    def build(self, number: int, example: dict[str, Any], rng: np.random.RandomState | None) -> dict[str, Any]:
        """What builder `number` makes of an example with a video; raises `Rejected`."""
        for _ in range(_ATTEMPTS):
            helper = self._process()
            try:
                result = helper.build(number, example, rng, self.timeout_s, self.lend)
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

    def _process(self) -> _Helper:
        if self._count >= self.videos_per_process:
            self.close()
        if self._helper is None:
            self._helper, self._count = _Helper(self.builders), 0
        self._count += 1
        return self._helper


class _Helper:
    """A process that builds examples, one at a time, and the memory in which it leaves their arrays."""

    def __init__(self, builders: list[ExampleBuilder]):
        context = multiprocessing.get_context("spawn")  # decoders and Ray do not survive a fork
        self._connection, theirs = context.Pipe()
        self._file = _anonymous_file()
        self._memory: mmap.mmap | None = None
        self.lent = 0
        """Bytes at the beginning of the memory that are in use."""
        self._process = context.Process(target=_serve, args=(theirs, DupFd(self._file), builders), name="video decoder", daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = self._connection.poll(START_TIMEOUT_S) and self._connection.recv()
        except EOFError:
            ready = False
        if not ready:  # no video's fault
            raise RuntimeError(f"the process that decodes videos does not start ({self.end()}); its messages are in this process's log")

    def build(
        self, number: int, example: dict[str, Any], rng: np.random.RandomState | None, timeout_s: float, lend: bool
    ) -> dict[str, Any] | Rejected:
        """What a builder makes of an example; its arrays are copies, or lent.

        Raises:
            TimeoutError: it takes longer.
            EOFError, OSError: the process has died.
        """
        self._connection.send((number, example, rng, self.lent))
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        pickled, places = self._connection.recv()
        end = max((stop for _, stop in places), default=0)
        if end > (len(self._memory) if self._memory else 0):
            self._memory = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)  # what was lent keeps the old one
        views = [memoryview(self._memory)[start:stop] if self._memory else b"" for start, stop in places]
        if lend:
            self.lent = max(self.lent, end)
        return pickle.loads(pickled, buffers=views if lend else map(bytearray, views))

    def end(self) -> str:
        """Ends the process if it has not ended; says how it did."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        os.close(self._file)
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve(connection: multiprocessing.connection.Connection, file: Any, builders: list[ExampleBuilder]) -> None:
    """The helper process: as long as its parent lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when
    threading.Thread(target=_end_with_parent, daemon=True).start()
    descriptor = file.detach()
    memory: mmap.mmap | None = None
    connection.send(True)
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            number, example, rng, start = connection.recv()
            result: dict[str, Any] | Rejected
            try:
                result = builders[number].build(example, rng)
            except Rejected as reason:
                result = reason
            buffers: list[pickle.PickleBuffer] = []
            pickled = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
            views = [buffer.raw() for buffer in buffers]
            places = []
            for view in views:
                places.append((start, start + view.nbytes))
                start = -(-(start + view.nbytes) // _ALIGNED) * _ALIGNED
            if views and (memory is None or len(memory) < start):
                size = -(-start // _GROWTH) * _GROWTH
                os.ftruncate(descriptor, size)
                memory = mmap.mmap(descriptor, size)
            for view, (begin, stop) in zip(views, places):
                if memory is not None:
                    memory[begin:stop] = view
            connection.send((pickled, places))


def _end_with_parent() -> None:
    """Also when the parent was killed while a decoder hangs here."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _anonymous_file() -> int:
    """A descriptor of memory without a name, which goes when nobody has it open."""
    if hasattr(os, "memfd_create"):  # unlike /dev/shm, not limited by a container's settings
        return os.memfd_create("video decoder")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _name(example: dict[str, Any]) -> str:
    video = example["video"]
    return video if isinstance(video, str) else f"video of {len(video):,} bytes"
