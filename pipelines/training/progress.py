"""From the workers to the driver: numbers, pictures, errors; in the other direction: the request to stop.

The first worker sends events to an inbox (a small actor beside the driver), the driver empties it. So a terminal, `ray job logs` and
MLflow are all fed from one place, and workers on other nodes need access to none of them.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.training.events import Event, Note, Step

HEARTBEAT_S = 0.5


class Inbox:
    """Events that the driver has not seen yet (an actor)."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stop = False
        self.controller: Any = None

    def put(self, event: Event) -> bool:
        """Adds an event; returns whether the driver wants the run to stop."""
        self.events.append(event)
        return self.stop

    def drain(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def request_stop(self) -> None:
        self.stop = True

    def set_controller(self, controller: Any) -> None:
        """Takes Ray Train's controller (an actor's handle), by which a run can be ended while its workers start."""
        self.controller = controller

    def get_controller(self) -> Any:
        return self.controller


def start_inbox() -> Any:
    """An inbox on the driver's node. Should its process die, another one takes its place, and what it had not answered is put again; what
    it held, since the driver last asked, is lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Inbox).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1).remote()


class Reporter:
    """The workers' end. Only the first worker speaks (`inbox`), all of them in an alarm."""

    def __init__(self, inbox: Any | None, alarms: Any | None = None):
        self.inbox, self.alarms = inbox, alarms
        self.stop_requested = False
        self._pending: Any | None = None
        self._last = 0.0

    def send(self, event: Event) -> None:
        if self.inbox is not None:
            self._hear()
            self._pending = self.inbox.put.remote(event)
            self._last = time.monotonic()

    def note(self, text: str) -> None:
        self.send(Note(text))

    def alarm(self, event: Event) -> None:
        """Sends an event from any worker, from any thread."""
        if self.alarms is not None:
            self.alarms.put.remote(event)

    def heartbeat(self, step: int) -> None:
        """Reports progress, at most twice a second, and learns whether the run should stop."""
        if self.inbox is None:
            return
        self._hear()
        if self._pending is None and time.monotonic() - self._last > HEARTBEAT_S:
            self.send(Step(step))

    def _hear(self) -> None:
        """Takes the answer to the latest event if it is there. A later event carries the same answer, so none is waited for."""
        if self._pending is not None and ray.wait([self._pending], timeout=0)[0]:
            self.stop_requested = self.stop_requested or ray.get(self._pending)
            self._pending = None

    def flush(self) -> None:
        """Waits until what was sent has arrived."""
        if self._pending is not None:
            ray.get(self._pending)


class ProgressBar:
    """A bar on a terminal; elsewhere (a log, `ray job logs`) a line for every logged step."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self.console = Console()
        self._first: tuple[int, float] | None = None
        self._bar: Progress | None = None
        self._task: Any = None
        if self.console.is_terminal:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
            numbers = TextColumn("{task.fields[numbers]}")
            self._bar = Progress(*columns, numbers, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task(f"train {name}", total=steps, numbers="starting workers")
            self._bar.start()
        else:
            self.print(f"train {name}: {steps} steps, starting workers")

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int) -> None:
        if self._first is None or step < self._first[0]:
            self._first = (step, time.monotonic())
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.step(step)
        numbers = f"loss {values['loss']:.3f}  acc {values['accuracy']:.1%}"
        if "tokens_per_second" in values:
            numbers += f"  {values['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in values:
            numbers += f"  MFU {values['mfu']:.1%}"
        if "data_wait" in values:
            numbers += f"  data wait {values['data_wait']:.0%}"
        if "gpu_memory_gib" in values:
            numbers += f"  {values['gpu_memory_gib']:.1f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, numbers=numbers)
        else:
            self.print(f"step {step}/{self.steps}  {numbers}  {self._left(step)} left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        if self._first is None or step <= self._first[0]:
            return "?"
        seconds = (time.monotonic() - self._first[1]) / (step - self._first[0]) * (self.steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
