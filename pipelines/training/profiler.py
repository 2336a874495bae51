"""A trace of a few steps, for chrome://tracing and Perfetto."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from pipelines.training.config import ProfileConfig
from pipelines.training.hooks import Hook, Step
from pipelines.training.parallel import rank
from pipelines.training.storage import Storage


class Profiler(Hook):
    """Records what the first rank does, on the host and on its GPU, into `traces/` of the run's folder."""

    def __init__(self, config: ProfileConfig, storage: Storage, say: Callable[[str], None]):
        self.first, self.last = config.steps
        self.storage, self.say = storage, say
        self._profile: torch.profiler.profile | None = None

    def after_step(self, step: Step) -> None:
        if rank() != 0:
            return
        if self._profile is None and self.first - 1 <= step.number < self.last:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        elif self._profile is not None and step.number >= self.last:
            self._write(self._profile)
            self._profile = None

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()

    def _write(self, profile: torch.profiler.profile) -> None:
        profile.stop()
        name = f"traces/steps_{self.first:06d}-{self.last:06d}.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json.gz"
            profile.export_chrome_trace(str(file))
            self.storage.write(name, file.read_bytes())
        self.say(f"steps {self.first} to {self.last} are traced: {self.storage.url}/{name} (ui.perfetto.dev shows it)")
