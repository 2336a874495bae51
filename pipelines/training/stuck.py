"""A step that does not end: each rank that waits says where it stands."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

from pipelines.training.events import Stuck
from pipelines.training.hooks import Hook, Step
from pipelines.training.parallel import rank

FRAMES = 12
BESIDE = ("data-prefetch", "checkpoint")
"""Threads that a step may wait for."""

logger = logging.getLogger(__name__)


class StuckWatch(Hook):
    """Tells, from a thread and once a step, that no step has ended for some time, and where this rank stands."""

    def __init__(self, seconds: float, alarm: Callable[[Stuck], None]):
        """Watches the thread that makes it. `alarm` is called from another one, on any rank."""
        self.seconds, self.alarm = seconds, alarm
        self._watched = threading.current_thread()
        self._step, self._since, self._told = 0, time.monotonic(), False
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="stuck-watch", daemon=True).start()

    def after_step(self, step: Step) -> None:
        self._step, self._since, self._told = step.number, time.monotonic(), False

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self.seconds / 4, 10.0)):
            waited = time.monotonic() - self._since
            if waited > self.seconds and not self._told:
                self._told = True
                stuck = Stuck(rank(), self._step, waited, stacks(self._watched))
                logger.warning(str(stuck))
                self.alarm(stuck)


def stacks(watched: threading.Thread) -> str:
    """Where a thread stands, and those that it may wait for; the innermost call last."""
    frames = sys._current_frames()
    shown = [watched, *(thread for thread in threading.enumerate() if thread.name in BESIDE and thread is not watched)]
    parts = []
    for thread in shown:
        if (frame := frames.get(thread.ident or 0)) is not None:
            parts.append(f"thread {thread.name}:\n" + "".join(traceback.format_stack(frame)[-FRAMES:]))
    return "".join(parts).rstrip()
