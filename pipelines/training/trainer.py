"""A training run, seen from the driver: Ray Train does the work, this shows it, records it and hears Ctrl-C."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import ray
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from molmo_core.config import ConfigError, flatten
from pipelines import tracking
from pipelines.data.batches.loader import TrainLoader
from pipelines.data.sources import open_records
from pipelines.evaluation.picture import draw_answers
from pipelines.model_folder import fixed_model, model_folder
from pipelines.training.checkpointing import MODEL_FOLDER
from pipelines.training.config import TrainConfig, pinned
from pipelines.training.loop import train_worker
from pipelines.training.pictures import training_curves
from pipelines.training.progress import ProgressBar, start_inbox

POLL_S = 0.2
RUN_FILE = "run.json"


@dataclasses.dataclass
class TrainResult:
    """What a run gave."""

    checkpoint: str | None
    """The trained model: a self-contained folder; None if the run was stopped before its last step."""
    run_id: str
    """The MLflow run."""
    step: int
    steps: int
    seconds: float
    metrics: list[tuple[int, dict[str, float]]]
    """(step, values) of everything logged by this call, in order."""

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def train(config: TrainConfig, make_loader: Callable[..., Any] = TrainLoader) -> TrainResult:
    """Trains, or goes on with a run of the same name and storage. Ray must be connected.

    SIGTERM or Ctrl-C makes the workers finish their step and save a checkpoint; a second Ctrl-C ends at once.

    Args:
        config: the run.
        make_loader: called on every worker like `TrainLoader`.

    Raises:
        ConfigError: settings that do not fit the run that goes on, the data or the cluster.
        NonFiniteError: the loss or a gradient is not finite.
        ray.train.TrainingFailedError: workers failed more often than `max_failures`.
    """
    started = time.perf_counter()
    folder = RunFolder(config)
    config = prepared(config)
    run = folder.open_run()
    inbox = start_inbox()
    with run, Fit(config, make_loader, inbox) as fit, contextlib.closing(ProgressBar(config.name, config.steps)) as bar:
        driver = Driver(config, run, bar)
        while not fit.done.wait(POLL_S):
            if fit.stop_requested:
                inbox.request_stop.remote()
            driver.handle(ray.get(inbox.drain.remote()))
        driver.handle(ray.get(inbox.drain.remote()))
        fit.result()
        driver.finish()
    step = driver.step
    checkpoint = f"{config.storage}/{config.name}/step_{config.steps:06d}/{MODEL_FOLDER}" if step >= config.steps else None
    return TrainResult(checkpoint, run.id, step, config.steps, time.perf_counter() - started, driver.metrics)


def prepared(config: TrainConfig) -> TrainConfig:
    """The configuration with what only the driver can decide: absolute paths, device, the place of registered weights."""
    config = copy.deepcopy(config)
    pinned(config)
    config = dataclasses.replace(config, storage=absolute(config.storage))
    if config.init_from is not None:
        config = dataclasses.replace(config, init_from=fixed_model(str(model_folder(config.init_from))))
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "auto":
        config = dataclasses.replace(config, device="gpu" if gpus >= config.num_workers else "cpu")
    cpus = ray.cluster_resources().get("CPU", 0)
    if (config.device == "gpu" and gpus < config.num_workers) or cpus < config.num_workers * config.cpus_per_worker:
        each = f"{config.cpus_per_worker:g} CPUs{' and a GPU' if config.device == 'gpu' else ''} each"
        raise ConfigError(f"num_workers={config.num_workers} with {each} do not fit into the cluster ({cpus:g} CPUs, {gpus} GPUs)")
    return config


def absolute(storage: str) -> str:
    """A URL as it is, a path in full."""
    return storage if "://" in storage else str(Path(storage).absolute())


class RunFolder:
    """`<storage>/<name>`: the run's configuration and MLflow run, beside Ray Train's checkpoints."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.url = f"{absolute(config.storage)}/{config.name}"

    def open_run(self) -> tracking.Run:
        """The MLflow run: a new one, or the one that this folder's run began.

        Raises:
            ConfigError: the folder's run has another model, data, seed or batch.
        """
        config, known = self.config, self._read()
        if known is None:
            run = tracking.Run(config.experiment, config.name)
            with fsspec.open(f"{self.url}/{RUN_FILE}", "w", auto_mkdir=True) as file:
                json.dump({"mlflow_run": run.id, "identity": _plain(config.identity())}, file)
        else:
            self._check(known["identity"])
            run = tracking.Run(config.experiment, config.name, run_id=known["mlflow_run"])
        run.log_params(config.as_dict())
        with tempfile.TemporaryDirectory() as temporary:
            file_name = Path(temporary) / "config.yaml"
            config.save(file_name)
            run.log_file(file_name)
            with fsspec.open(f"{self.url}/config.yaml", "w", auto_mkdir=True) as file:
                file.write(file_name.read_text())
        return run

    def _read(self) -> dict[str, Any] | None:
        try:
            with fsspec.open(f"{self.url}/{RUN_FILE}", "r") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def _check(self, before: dict[str, Any]) -> None:
        old, new = flatten(before), flatten(_plain(self.config.identity()))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            lines = [f"  {key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed[:10]]
            raise ConfigError(
                f"{self.url} holds a run with other settings; a run can only go on with the same ones\n"
                + "\n".join(lines)
                + "\nGive the new run another name (name=...), or delete the folder to begin anew."
            )


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


class Fit:
    """Ray Train's run in a thread, so that the main thread can show progress and hear signals."""

    def __init__(self, config: TrainConfig, make_loader: Callable[..., Any], inbox: Any):
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers keep the driver's folder: relative paths mean the same
        gpu = config.device == "gpu"
        resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if gpu else {})
        self.trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": config, "loader": make_loader, "inbox": inbox},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name=config.name,
                storage_path=config.storage,
                failure_config=FailureConfig(max_failures=config.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            ),
        )
        self.done = threading.Event()
        self.stop_requested = False
        self._result: Result | None = None
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

    def result(self) -> Result:
        """What Ray Train's `fit` returned or raised."""
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _fit(self) -> None:
        try:
            self._result = self.trainer.fit()
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    def _stop(self, number: int, frame: Any) -> None:
        # SIGTERM often comes twice (to a process and to its group); what cannot wait sends SIGKILL.
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True


class Driver:
    """Turns events into a progress bar, MLflow metrics and pictures."""

    def __init__(self, config: TrainConfig, run: tracking.Run, bar: ProgressBar):
        self.config, self.run, self.bar = config, run, bar
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.step = 0

    def handle(self, events: list[tuple[str, int, Any]]) -> None:
        """Handles what came in, in order; raises what a worker reported as the end of the run."""
        for kind, step, content in events:
            if kind == "failed":
                raise content
            getattr(self, f"_{kind}")(step, content)

    def finish(self) -> None:
        """The curves of the whole run, earlier parts of a resumed one included, as a picture."""
        history = {
            name: [(m.step, m.value) for m in self.run.client.get_metric_history(self.run.id, name)]
            for name in ("loss", "validation/loss", "accuracy", "validation/accuracy")
        }
        self.run.log_picture(training_curves(history, self.config.name), "training.png")

    def _step(self, step: int, _: None) -> None:
        self.bar.step(step)

    def _metrics(self, step: int, values: dict[str, float]) -> None:
        self.metrics.append((step, values))
        self.run.log_metrics(values, step)
        if "loss" in values:
            self.bar.metrics(step, values)
        else:
            self.bar.print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def _samples(self, step: int, results: list[dict[str, Any]]) -> None:
        assert self.config.samples is not None
        picture = draw_answers(results, open_records(self.config.samples.records), len(results))
        self.run.log_picture(picture, f"samples/step_{step:06d}.png")

    def _resumed(self, step: int, _: None) -> None:
        self.bar.print(f"going on after step {step}")

    def _checkpoint(self, step: int, _: None) -> None:
        self.step = max(self.step, step)

    def _stopped(self, step: int, _: None) -> None:
        self.step = step
        self.bar.print(f"stopped after step {step}; its checkpoint is saved, and the same command goes on from there")

    def _done(self, step: int, _: None) -> None:
        self.step = step
