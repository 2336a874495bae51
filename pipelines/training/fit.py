"""Ray Train's run in a thread of its own, so that the main thread can show progress and handle signals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines import environment
from pipelines.training.config import TrainConfig
from pipelines.training.controller import callbacks
from pipelines.training.loop import train_worker
from pipelines.training.storage import Storage

ABANDON_S = 20.0
"""How long Ray Train may take to begin, before it can be ended, and to end."""


class Fit:
    """Ray Train's run, for the length of a `with` block; left before its end (an error, a signal), it is abandoned."""

    def __init__(self, config: TrainConfig, make_loader: Callable[..., Any], inbox: Any):
        environment.defaults(environment.TRAINING)
        if not config.name.isascii():
            environment.defaults(environment.ASCII_TAGS)
        storage = Storage(config.storage, config.name)
        gpu = config.device == "gpu"
        resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if gpu else {})
        self.inbox = inbox
        self.trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": config, "loader": make_loader, "inbox": inbox},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name=config.name,
                storage_path=storage.root,
                storage_filesystem=None if storage.local else storage.filesystem,
                failure_config=FailureConfig(max_failures=config.max_failures),
                callbacks=callbacks(inbox, config.max_failures),
            ),
        )
        self.done = threading.Event()
        self.stopped_by: signal.Signals | None = None
        """The signal that asks for the end of the run."""
        self._error: BaseException | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Fit:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)
        threading.Thread(target=self._fit, name="ray-train", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if not self.done.is_set():
            self._abandon()

    def check(self) -> None:
        """Raises what Ray Train raised."""
        if self._error is not None:
            raise self._error

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    def _stop(self, number: int, frame: Any) -> None:
        # SIGTERM often comes twice (to a process and to its group); what cannot wait sends SIGKILL.
        if self.stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped_by = self.stopped_by or signal.Signals(number)

    def _abandon(self) -> None:
        """Ends Ray Train's controller, and the workers with it."""
        end = time.monotonic() + ABANDON_S
        while not self.done.wait(0.1) and time.monotonic() < end:
            if controller := ray.get(self.inbox.get_controller.remote()):
                ray.kill(controller)
                self.done.wait(end - time.monotonic())
