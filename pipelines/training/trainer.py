"""A training run, seen from the driver: Ray Train does the work; this displays it, records it and handles Ctrl-C and SIGTERM."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
import time
from collections.abc import Callable
from typing import Any

import ray

from molmo_core.config import ConfigError
from pipelines import cluster
from pipelines.data.batches.loader import TrainLoader
from pipelines.data.sources import open_records
from pipelines.evaluation.picture import draw_answers
from pipelines.model_folder import fixed_model, model_folder
from pipelines.training.belonging import check_belonging
from pipelines.training.config import TrainConfig, pinned
from pipelines.training.events import Before, Done, Event, Failed, Metrics, Note, Samples, Saved, Started, Step, Stopped, Stuck, Unusual
from pipelines.training.fit import Fit
from pipelines.training.health import named
from pipelines.training.memory import check_memory
from pipelines.training.pictures import training_curves
from pipelines.training.progress import ProgressBar, start_inbox
from pipelines.training.recorder import Recorder
from pipelines.training.run_folder import RunFolder
from pipelines.training.storage import absolute, step_name

POLL_S = 0.2
SAVE_S = 120
"""What a stopped run is given to end its step and to save (docs/training.md): a job with less is told so."""


@dataclasses.dataclass
class TrainResult:
    """What a run gave."""

    checkpoint: str | None
    """The trained model: a self-contained folder, which exists; None if the run was stopped before its last step."""
    run_id: str
    """The MLflow run."""
    step: int
    """The step of the newest checkpoint."""
    steps: int
    """Steps of the run, as configured."""
    seconds: float
    metrics: list[tuple[int, dict[str, float]]]
    """(step, values) of everything logged by this call, in order."""
    stopped_by: signal.Signals | None = None
    """SIGINT or SIGTERM, if that ended the run before its last step."""

    @property
    def finished(self) -> bool:
        return self.checkpoint is not None


def run_training(config: TrainConfig, make_loader: Callable[..., Any] = TrainLoader, num_cpus: int | None = None) -> TrainResult:
    """Trains, or continues a run of the same name and storage, on the cluster that is connected or a new one.

    SIGTERM or Ctrl-C makes the workers finish their step and save a checkpoint, or ends the run at once while they are still starting;
    a second Ctrl-C ends it in any case.

    Args:
        config: the run.
        make_loader: called on every worker like `TrainLoader`.
        num_cpus: CPUs of a cluster that is started here (see `cluster.connect`).

    Raises:
        ConfigError: settings that do not fit the folder's run, the data (`check_belonging`), the memory (`check_memory`) or the cluster;
            another training of this name runs; the tracking server does not answer.
        TrainingError: the loss or a gradient is not finite (NonFiniteError), or the storage takes no more checkpoints.
        ray.train.TrainingFailedError: workers failed more often than `max_failures`.
    """
    started = time.perf_counter()
    folder = RunFolder(config)
    folder.check_tracking()
    with folder.lock():
        folder.check()
        if make_loader is TrainLoader:  # another one reads what it likes
            check_belonging(config)
        check_memory(config)
        config = pinned_down(config)
        with cluster.connect(num_cpus=num_cpus):
            config = fitted(config)
            with Driver(config, folder) as driver:
                driver.run(make_loader)
    return driver.result(time.perf_counter() - started)


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def pinned_down(config: TrainConfig) -> TrainConfig:
    """The configuration as every process must read it: absolute paths, the place of registered weights."""
    config = copy.deepcopy(config)
    pinned(config)
    config = dataclasses.replace(config, storage=absolute(config.storage))
    if config.init_from is not None:
        config = dataclasses.replace(config, init_from=fixed_model(str(model_folder(config.init_from))))
    return config


def fitted(config: TrainConfig) -> TrainConfig:
    """The configuration with its device; raises ConfigError if the cluster is too small."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "auto":
        config = dataclasses.replace(config, device="gpu" if gpus >= config.num_workers else "cpu")
    cpus = ray.cluster_resources().get("CPU", 0)
    if (config.device == "gpu" and gpus < config.num_workers) or cpus < config.num_workers * config.cpus_per_worker:
        each = f"{config.cpus_per_worker:g} CPUs{' and a GPU' if config.device == 'gpu' else ''} each"
        raise ConfigError(f"num_workers={config.num_workers} with {each} do not fit into the cluster ({cpus:g} CPUs, {gpus} GPUs)")
    return config


class Driver:
    """Runs Ray Train, and turns what its workers tell into a progress bar, MLflow metrics and pictures."""

    def __init__(self, config: TrainConfig, folder: RunFolder):
        self.config, self.storage = config, folder.storage
        self.mlflow = folder.open_run()
        self.bar = ProgressBar(config.name, config.steps)
        self.recorder = Recorder(self.mlflow, folder.storage, self.bar.print)
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.step = 0
        self.model: str | None = None
        self.started = False
        self.stopped_by: signal.Signals | None = None
        for note in folder.notes:
            self.bar.print(note)
        if (seconds := cluster.stop_grace()) is not None and seconds < SAVE_S:
            self.bar.print(
                f"`ray job stop` gives this job {seconds} s to save, then kills it; with "
                f'"RAY_JOB_STOP_WAIT_TIME_S": "{SAVE_S}" among the env_vars of `ray job submit` it is {SAVE_S} s'
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        killed = self.stopped_by or (kind is not None and not issubclass(kind, Exception))  # Ctrl-C twice
        self.bar.close()
        self.storage.tidy()
        self.recorder.close("KILLED" if killed else "FINISHED" if kind is None else "FAILED")

    def run(self, make_loader: Callable[..., Any]) -> None:
        """To the last step, or until the run is stopped.

        Raises:
            Exception: what a worker reported as the end of the run, or what Ray Train raised.
        """
        self.storage.tidy()
        inbox, told = start_inbox(), False
        with Fit(self.config, make_loader, inbox) as fit:
            while not fit.done.wait(POLL_S):
                self.handle(ray.get(inbox.drain.remote()))
                self.recorder.look()
                if fit.stopped_by and not told:
                    self.recorder.ends("KILLED")  # now: what sent the signal may not wait for the save
                    told = True
                if fit.stopped_by and not self.started:
                    self.stopped_by = fit.stopped_by
                    self.bar.print("stopped while the workers were starting; the same command continues")
                    return
                if fit.stopped_by:
                    inbox.request_stop.remote()
            self.handle(ray.get(inbox.drain.remote()))
            fit.check()
        if self.model is None:
            self.stopped_by = fit.stopped_by
        self.recorder.picture("training.png", lambda: training_curves(self._history(), self.config.name))

    def result(self, seconds: float) -> TrainResult:
        return TrainResult(self.model, self.mlflow.id, self.step, self.config.steps, seconds, self.metrics, self.stopped_by)

    def handle(self, events: list[Event]) -> None:
        """Handles what came in, in order; raises what a worker reported as the end of the run."""
        for event in events:
            match event:
                case Note(text):
                    self.bar.print(text)
                case Started(step, parts):
                    if step:
                        self.bar.print(f"continues after step {step}" if step < self.config.steps else f"step {step} is trained already")
                    self.bar.print(f"start of a worker: {', '.join(f'{part} {seconds:.1f} s' for part, seconds in parts.items())}")
                    self.recorder.metrics(step, {f"start/{part}": seconds for part, seconds in parts.items()}, now())
                    self.step, self.started = step, True
                case Step(step):
                    self.bar.step(step)
                case Metrics():
                    self._metrics(event)
                case Before(entries):
                    for entry in entries:
                        self.recorder.metrics(entry.step, entry.values, entry.when)
                case Samples(step, results):
                    self._samples(step, results)
                case Unusual():
                    self._unusual(event)
                case Stuck():
                    self.bar.print(str(event))
                case Saved():
                    self._saved(event)
                case Stopped(step):
                    self.step = step
                    self.bar.print(f"stopped after step {step}; its checkpoint is saved, and the same command continues")
                case Done(step, model):
                    self.step, self.model = step, model
                case Failed(error):
                    raise error

    def _unusual(self, unusual: Unusual) -> None:
        file = f"unusual/{step_name(unusual.step)}.json"
        self.bar.print(f"step {unusual.step}: {unusual.text} {named(unusual.examples)}")
        try:
            self.storage.write(file, json.dumps(dataclasses.asdict(unusual), indent=1))
        except OSError as error:
            self.bar.print(f"{self.storage.url}/{file} cannot be written: {error.strerror or error}")

    def _saved(self, saved: Saved) -> None:
        self.step = saved.step
        values = {"save/seconds": saved.seconds, "save/staging": saved.staging, "save/blocked": saved.blocked}
        self.metrics.append((saved.step, values))
        self.recorder.metrics(saved.step, values, now())
        stood_still = saved.staging + saved.blocked
        self.bar.print(f"step {saved.step} is saved: {saved.seconds:.1f} s, of which training stood still for {stood_still:.2f} s")

    def _metrics(self, metrics: Metrics) -> None:
        step, values = metrics.step, metrics.values
        self.metrics.append((step, values))
        self.recorder.metrics(step, values, metrics.when)
        if "loss" in values:
            self.bar.metrics(step, values)
        else:
            self.bar.print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def _samples(self, step: int, results: list[dict[str, Any]]) -> None:
        if not results:
            return
        assert self.config.samples is not None
        records = self.config.samples.records
        self.recorder.picture(f"samples/step_{step:06d}.png", lambda: draw_answers(results, open_records(records)))

    def _history(self) -> dict[str, list[tuple[int, float]]]:
        """What MLflow has of the whole run, earlier parts of a continued one included."""
        return {
            name: [(m.step, m.value) for m in self.mlflow.client.get_metric_history(self.mlflow.id, name)]
            for name in ("loss", "validation/loss", "accuracy", "validation/accuracy")
        }
