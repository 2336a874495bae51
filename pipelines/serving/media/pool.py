"""The processes in which media are decoded: a file that crashes or hangs its decoder costs its request only.

A pool belongs to a frontend. Processes of its own, in place of a Serve deployment, because of what they may do: they can be given less
priority and memory, be killed in the middle of a file, and are there again in half a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import queue
import resource
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.serving.errors import queue_full
from pipelines.serving.media.features import Features, Task, Unusable, media_features
from pipelines.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

Run = Callable[[Task], Awaitable[Features | Unusable]]
"""Prepares a medium somewhere; raises ApiError 429 when there is no place for it."""

MEMORY = 8 << 30
"""Bytes that a process may map."""
NICENESS = 10
"""Whoever streams an answer goes before."""
TASKS_PER_PROCESS = 1000
"""Then a process is replaced: decoders leak."""
_ATTEMPTS = 2  # a process may also be killed because the machine is out of memory


async def in_thread(task: Task) -> Features | Unusable:
    """Without a pool, for those who trust the media."""
    return await asyncio.to_thread(media_features, task)


class MediaPool:
    """Some processes and a queue before them. Called from one event loop.

    Args:
        workers: processes.
        places: media that wait or are in work; the next one is refused.
        timeout_s: longest time for one medium, without waiting.
    """

    def __init__(self, workers: int, places: int, timeout_s: float) -> None:
        self._places, self._timeout_s = places, timeout_s
        self._inside = 0
        self._threads = ThreadPoolExecutor(workers, "media")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._workers: set[_Worker] = set()
        for _ in range(workers):
            self._start()

    async def __call__(self, task: Task) -> Features | Unusable:
        """The features of a medium, or why there are none. Who is cancelled while waiting gives up the place.

        Raises:
            ApiError: 429, the queue is full.
        """
        if self._inside >= self._places:
            raise queue_full()
        self._inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._work, task)
        finally:
            self._inside -= 1

    def close(self) -> None:
        """Ends the processes; media that wait are not prepared any more."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.process.end()

    def _work(self, task: Task) -> Features | Unusable:
        code = "invalid_image" if task.frames is None else "invalid_video"
        for _ in range(_ATTEMPTS):
            worker = self._idle.get()
            worker.tasks += 1
            try:
                result = worker.process.call(task, timeout_s=self._timeout_s)
            except TimeoutError:
                self._replace(worker)
                return Unusable(code, f"it takes more than {self._timeout_s:g} s to decode")
            except (EOFError, OSError):
                ended = self._replace(worker)
                continue
            if worker.tasks >= TASKS_PER_PROCESS:
                self._replace(worker)
            else:
                self._idle.put(worker)
            return result
        return Unusable(code, f"it crashes the decoder ({ended})")

    def _replace(self, worker: _Worker) -> str:
        """Ends a process and starts another beside the work of the others; says how it ended."""
        self._workers.discard(worker)
        how = worker.process.end()
        if worker.tasks < TASKS_PER_PROCESS:
            logger.warning("A process that decodes media was replaced (%s)", how)
        self._start()
        return how

    def _start(self) -> None:
        threading.Thread(target=self._start_worker, name="media worker's start", daemon=True).start()

    def _start_worker(self) -> None:
        worker = _Worker(WorkerProcess(media_features, "media decoder", _give_way))
        self._workers.add(worker)
        self._idle.put(worker)
        if self._closed.is_set():
            worker.process.end()


@dataclasses.dataclass(eq=False)
class _Worker:
    process: WorkerProcess
    tasks: int = 0


def _give_way() -> None:
    """What a process may take."""
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(OSError):  # not on every system
        Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory: these go first
