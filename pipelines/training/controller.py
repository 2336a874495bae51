"""What is used of Ray Train's inside: its controller, which `fit` keeps to itself. A Ray without it trains as well; a stop while workers
start then takes as long as their start."""

from __future__ import annotations

import logging
from typing import Any

import ray

try:
    from ray.train.v2._internal.execution.callback import ControllerCallback
except ImportError:  # another version of Ray
    ControllerCallback = None  # type: ignore[assignment, misc]

logger = logging.getLogger(__name__)


def callbacks(inbox: Any) -> list[Any]:
    """Callbacks of a run that put the controller into the inbox."""
    if ControllerCallback is None:
        logger.warning("Ray %s does not show Ray Train's controller: a stop while workers start is slow", ray.__version__)
        return []

    class Handle(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            inbox.set_controller.remote(ray.get_runtime_context().current_actor)

    return [Handle()]
