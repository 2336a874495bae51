"""How long a worker needs until its first step, by part: what a run loses when a worker dies."""

from __future__ import annotations

import time

import psutil


class Startup:
    """A watch over the parts of a start. The first, `process`, is from the process's start to here: Python, imports, process group."""

    def __init__(self) -> None:
        self.parts = {"process": max(0.0, time.time() - psutil.Process().create_time())}
        """Seconds."""
        self._since = time.perf_counter()

    def done(self, part: str) -> None:
        """What was done since the last call, or the beginning, was this part."""
        now = time.perf_counter()
        self.parts[part], self._since = now - self._since, now
