"""Videos are decoded in a process of their own: a file that crashes or hangs a decoder costs one record, and leaks end with the process.

Ray restarts an actor that dies and gives it the same work again, so one file that always kills the decoder would be tried for
ever. Here the decode actor hands each video to a helper process and survives it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from pipelines.data.builder import ExampleBuilder
from pipelines.data.sources import Record, Rejected

TIMEOUT_S = 600.0
VIDEOS_PER_PROCESS = 500
_LIMITS: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}  # its caller has the CPU and waits
_ATTEMPTS = 2  # a process may also be killed because the machine is out of memory


class IsolatedBuilder:
    """An `ExampleBuilder` whose videos are decoded in a helper process.

    Args:
        builder: does the work, there and here.
        timeout_s: longest time for one video.
        videos_per_process: then the helper process is replaced.
    """

    def __init__(self, builder: ExampleBuilder, timeout_s: float = TIMEOUT_S, videos_per_process: int = VIDEOS_PER_PROCESS):
        self.builder, self.timeout_s, self.videos_per_process = builder, timeout_s, videos_per_process
        self._reference: Any = None
        self._helper: Any = None
        self._count = 0

    def __call__(self, record: Record, rng: np.random.RandomState) -> dict[str, Any]:
        """The preprocessed example; raises `Rejected`, also for a video that crashes its decoder or takes too long."""
        example = self.builder.example(record)
        if "video" not in example:
            return self.builder.finish(example, rng)
        for _ in range(_ATTEMPTS):
            process = self._process()
            try:
                result = ray.get(process.finish.remote(example, rng), timeout=self.timeout_s)
            except GetTimeoutError:
                self._stop()
                raise Rejected("video: takes too long to decode", f"{_name(example)}: more than {self.timeout_s:g} s") from None
            except RayActorError:
                self._helper = None
                continue
            if isinstance(result, Rejected):
                raise result
            return result
        raise Rejected("video: crashes the decoder", f"{_name(example)}: the process died {_ATTEMPTS} times")

    def _process(self) -> Any:
        if self._helper is not None and self._count >= self.videos_per_process:
            self._stop()
        if self._helper is None:
            self._reference = self._reference or ray.put(self.builder)
            self._helper = ray.remote(**_LIMITS)(_Helper).remote(self._reference)
            ray.get(self._helper.ready.remote())  # what fails here is no video's fault, and is raised
            self._count = 0
        self._count += 1
        return self._helper

    def _stop(self) -> None:
        ray.kill(self._helper)
        self._helper = None


class _Helper:
    def __init__(self, builder: ExampleBuilder):
        self.builder = builder

    def ready(self) -> None:
        """The process runs."""

    def finish(self, example: dict[str, Any], rng: np.random.RandomState) -> dict[str, Any] | Rejected:
        try:
            return self.builder.finish(example, rng)
        except Rejected as reason:
            return reason


def _name(example: dict[str, Any]) -> str:
    video = example["video"]
    return video if isinstance(video, str) else f"video of {len(video):,} bytes"
