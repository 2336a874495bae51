"""How long the device works on something, without waiting for it meanwhile."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Runs from its construction to `stop`, in the device's time."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._start = self._now()
        self._end: Any = None

    def stop(self) -> None:
        """What was queued on the device until here counts."""
        self._end = self._now()

    def seconds(self) -> float:
        """Waits for the device, if it is not there yet."""
        if not self._cuda:
            return float(self._end - self._start)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1000

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
