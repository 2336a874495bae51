"""What Ray Train's controller, which `fit` keeps to itself, tells a run: its own handle, and why workers failed.

The handle comes from Ray Train's inside. A Ray without it trains as well; a stop while workers start then takes as long as their start.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.train import UserCallback

from pipelines.training.events import Note

try:
    from ray.train.v2._internal.execution.callback import ControllerCallback
except ImportError:  # another version of Ray
    ControllerCallback = None  # type: ignore[assignment, misc]

logger = logging.getLogger(__name__)


class Failures(UserCallback):
    """Tells the driver why workers failed. Ray Train, which starts them again, writes it into the controller's log alone."""

    def __init__(self, inbox: Any, most: int):
        self.inbox, self.most, self.count = inbox, most, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.count += 1
        ranks: dict[str, list[int]] = {}
        for rank, error in sorted(worker_exceptions.items()):
            ranks.setdefault(str(error).strip() or repr(error), []).append(rank)
        reasons = [f"workers failed (rank {', '.join(map(str, who))}): {text}" for text, who in ranks.items()]
        again = f"starting them again from the newest checkpoint: failure {self.count}, max_failures {self.most}"
        self.inbox.put.remote(Note("\n".join(reasons + ([again] if self.count <= self.most else []))))


def callbacks(inbox: Any, max_failures: int) -> list[Any]:
    """Callbacks of a run that put what the controller knows into the inbox."""
    failures = Failures(inbox, max_failures)
    if ControllerCallback is None:
        logger.warning("Ray %s does not show Ray Train's controller: a stop while workers start is slow", ray.__version__)
        return [failures]

    class Handle(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            inbox.set_controller.remote(ray.get_runtime_context().current_actor)

    return [Handle(), failures]
