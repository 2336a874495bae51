"""A process for work that may crash, hang or leak, such as decoding files of strangers: who uses it survives it.

Arrays come back through memory that both map: a Ray actor in its place would send them through the object store, which took a tenth of
a clip's CPU time (16 frames of 640 x 360).
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
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

START_TIMEOUT_S = 120.0
_ALIGNED, _GROWTH = 64, 16 << 20  # bytes


class WorkerProcess:
    """A process that calls a function on what it is sent, one call at a time, and the memory in which it leaves the results' arrays.

    Args:
        work: the function; it is sent to the process once. An exception of it ends the process: what it may fail at, it returns.
        name: of the process.
        begin: called first in the process.

    Raises:
        RuntimeError: the process does not start.
    """

    def __init__(self, work: Callable[..., Any], name: str, begin: Callable[[], None] | None = None):
        context = multiprocessing.get_context("spawn")  # decoders and Ray do not survive a fork
        self._connection, theirs = context.Pipe()
        self._file = _anonymous_file(name)
        self._memory: mmap.mmap | None = None
        self.lent = 0
        """Bytes at the beginning of the memory that are in use: results that were lent, and the gaps between them."""
        self._process = context.Process(target=_serve, args=(theirs, DupFd(self._file), work, begin), name=name, daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = self._connection.poll(START_TIMEOUT_S) and self._connection.recv()
        except EOFError:
            ready = False
        if not ready:  # nobody's work is at fault
            raise RuntimeError(f"the process '{name}' does not start ({self.end()}); its messages are in this process's log")

    def call(self, *args: Any, timeout_s: float, lend: bool = False) -> Any:
        """What the function returns.

        Args:
            args: of the function.
            timeout_s: longest time for it.
            lend: the arrays are read-only views of the memory in which the process leaves them, valid until `lent` is set back;
                else copies.

        Raises:
            TimeoutError: it takes longer; the process must be ended.
            EOFError, OSError: the process has died.
        """
        self._connection.send((args, self.lent))
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        pickled, places = self._connection.recv()
        end = max((stop for _, stop in places), default=0)
        if end > (len(self._memory) if self._memory else 0):
            self._memory = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)  # what was lent keeps the old one
        views = [memoryview(self._memory)[start:stop] if self._memory else memoryview(b"") for start, stop in places]
        if lend:
            self.lent = max(self.lent, end)
        return pickle.loads(pickled, buffers=views if lend else map(_copy, views))

    def end(self) -> str:
        """Ends the process if it has not ended; says how it did."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        os.close(self._file)
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _copy(view: memoryview) -> np.ndarray:
    """A copy that lets other threads run meanwhile, unlike bytearray's."""
    return np.asarray(view).copy()


def _serve(
    connection: multiprocessing.connection.Connection, file: Any, work: Callable[..., Any], begin: Callable[[], None] | None
) -> None:
    """The process: as long as its parent lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when
    threading.Thread(target=_end_with_parent, daemon=True).start()
    descriptor = file.detach()
    memory: mmap.mmap | None = None
    if begin is not None:
        begin()
    connection.send(True)
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            args, start = connection.recv()
            buffers: list[pickle.PickleBuffer] = []
            pickled = pickle.dumps(work(*args), protocol=5, buffer_callback=buffers.append)
            views = [buffer.raw() for buffer in buffers]
            places = []
            for view in views:
                places.append((start, start + view.nbytes))
                start = -(-(start + view.nbytes) // _ALIGNED) * _ALIGNED
            if views and (memory is None or len(memory) < start):
                size = -(-start // _GROWTH) * _GROWTH
                os.ftruncate(descriptor, size)
                memory = mmap.mmap(descriptor, size)
            for view, (first, stop) in zip(views, places):
                if memory is not None:
                    memory[first:stop] = view
            connection.send((pickled, places))


def _end_with_parent() -> None:
    """Also when the parent was killed while a decoder hangs here."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _anonymous_file(name: str) -> int:
    """A descriptor of memory without a name, which goes when nobody has it open."""
    if hasattr(os, "memfd_create"):  # unlike /dev/shm, not limited by a container's settings
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
