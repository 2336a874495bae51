"""Runs: parameters, metrics, files and pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils import validation
from mlflow.utils.time import get_current_time_millis

from molmo_core.config import flatten
from pipelines.names import file_name, masked, shortened
from pipelines.tracking.names import MAX_KEY, MAX_NAME, MAX_RUN_NAME, TrackingError, check_name, key, level
from pipelines.tracking.places import client, database_of, tracking_uri

if TYPE_CHECKING:
    from PIL.Image import Image

EVALUATION = "evaluation/"
"""Metrics of evaluations begin with this; they are shares of 1."""
# How MLflow's pages tell model training from agents and prompts.
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}


class Run:
    """One MLflow run. As a context manager it ends as FINISHED, FAILED (an exception) or KILLED (Ctrl-C)."""

    def __init__(self, experiment: str, name: str, run_id: str | None = None) -> None:
        """Starts a run, or continues `run_id` (a resumed job writes into the run that it began).

        Names of runs can be any text. Raises TrackingError: no such run, or an experiment's name that MLflow refuses.
        """
        check_name("experiment", experiment, validation._validate_experiment_name, MAX_NAME)
        self.client = client()
        if run_id:
            try:
                self.client.update_run(run_id, status="RUNNING")
            except MlflowException as error:
                raise TrackingError(f"run {run_id} is not in {masked(tracking_uri())}: {error.message}") from None
            self.id = run_id
        else:
            experiment_id = known_experiment(self.client, experiment) or _new_experiment(self.client, experiment)
            self.id = self.client.create_run(experiment_id, run_name=_text(name)[:MAX_RUN_NAME]).info.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs a (nested) configuration as dotted parameters, under any names.

        Values logged before stay: MLflow never changes a parameter.
        """
        known = self.client.get_run(self.id).data.params
        named = {shortened(name, MAX_KEY): value for name, value in flatten(params, level).items()}
        flat = [Param(name, _text(str(value))[: validation.MAX_PARAM_VAL_LENGTH]) for name, value in named.items() if name not in known]
        for start in range(0, len(flat), validation.MAX_PARAMS_TAGS_PER_BATCH):
            self.client.log_batch(self.id, params=flat[start : start + validation.MAX_PARAMS_TAGS_PER_BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0, when: int | None = None) -> None:
        """Logs numbers under any names (as `key` writes them); `when`: milliseconds since 1970, None = now."""
        now = when or get_current_time_millis()
        found = [Metric(key(name), float(value), now, step) for name, value in metrics.items()]
        for start in range(0, len(found), validation.MAX_METRICS_PER_BATCH):
            self.client.log_batch(self.id, metrics=found[start : start + validation.MAX_METRICS_PER_BATCH])

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Copies a file, or a folder's content, into the run's artifacts."""
        log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
        log(self.id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Saves a text among the run's artifacts."""
        self.client.log_text(self.id, text, name)

    def log_picture(self, picture: Image, name: str) -> None:
        """Saves a picture among the run's artifacts, e.g. as `samples/step_000100.png`."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / Path(name).name
            picture.save(target)
            self.log_file(target, str(Path(name).parent) if Path(name).parent != Path() else None)

    def finish(self, status: str = "FINISHED") -> None:
        self.client.set_terminated(self.id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED"
        try:
            self.finish(status)
        except MlflowException as failure:
            if error is None:
                raise
            error.add_note(f"MLflow's run {self.id} could not be ended as {status}: {failure.message}")


def known_experiment(opened: mlflow.MlflowClient, name: str) -> str | None:
    """The id of an experiment, None if it is new; raises TrackingError if it was deleted, or MLflow refuses its name."""
    check_name("experiment", name, validation._validate_experiment_name, MAX_NAME)
    found = opened.get_experiment_by_name(name)
    if found and found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} was deleted in {masked(tracking_uri())}; restore it (`mlflow experiments restore`) or rename"
        )
    return found.experiment_id if found else None


def _new_experiment(opened: mlflow.MlflowClient, name: str) -> str:
    uri = tracking_uri()
    if not uri.startswith("sqlite:"):  # a server decides itself where artifacts go
        return opened.create_experiment(name, tags=TRAINING_PAGES)
    artifacts = database_of(uri).parent / "mlartifacts" / file_name(name)
    return opened.create_experiment(name, artifact_location=artifacts.as_uri(), tags=TRAINING_PAGES)


def _text(value: str) -> str:
    """Text that a database takes: without halves of surrogate pairs and zeros."""
    return value.encode("utf-8", "replace").decode().replace("\0", "�")
