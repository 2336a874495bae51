"""Machines that a cloud takes back: Ray hears of it before, and the run saves what it has."""

from __future__ import annotations

import time

import ray.train

from pipelines.training.parallel import rank

ASK_S = 5.0
"""Between two questions, each of which is a barrier of all ranks; Ray itself looks as often."""


class Preemption:
    """Nodes of this run that are going to be taken away. Ray Train starts the workers anew elsewhere, and counts no failure."""

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._known: set[str] = set()

    def due(self) -> bool:
        """Whether the ranks should ask now: the first one decides, by its clock."""
        return rank() == 0 and time.monotonic() - self._asked > ASK_S

    def ask(self) -> str | None:
        """A line about nodes that are newly known to go; all ranks call it, and all get the same."""
        self._asked = time.monotonic()
        info = ray.train.get_preemption_info()
        if info is None or not (new := set(info.preempted_node_ids) - self._known):
            return None
        self._known |= new
        left = "" if info.deadline_ms is None else f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
        ranks = ", ".join(map(str, info.preempted_ranks))
        return f"the node of rank {ranks} is going to be taken away{left}: a checkpoint is saved, and the run goes on elsewhere"
