"""What was logged of late, saved with every checkpoint.

Only the driver writes to MLflow. When it is killed, its workers live on for some seconds and may save steps whose numbers nobody recorded:
who continues from there sends them again. MLflow ignores an entry (name, step, value, time) that it has.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pipelines.training.events import Before, Event, Metrics
from pipelines.training.hooks import Hook

RECENT_S, MOST = 120.0, 500
"""Seconds and entries that are kept: longer than workers outlive their driver (about ten seconds) and a call to MLflow takes to fail."""


class Recent(Hook):
    """Passes events on, and keeps those with numbers for a while."""

    def __init__(self, send: Callable[[Event], None]):
        self._send = send
        self._kept: deque[Metrics] = deque(maxlen=MOST)

    def send(self, event: Event) -> None:
        if isinstance(event, Metrics):
            self._kept.append(event)
        self._send(event)

    def state(self) -> dict[str, Any]:
        oldest = (time.time() - RECENT_S) * 1000
        while self._kept and self._kept[0].when < oldest:
            self._kept.popleft()
        return {"metrics": [dataclasses.asdict(entry) for entry in self._kept]}

    def load_state(self, state: dict[str, Any]) -> None:
        self._kept.extend(Metrics(**entry) for entry in state.get("metrics", ()))
        if self._kept:
            self._send(Before(list(self._kept)))
