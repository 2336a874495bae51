"""MLflow: runs with their metrics and pictures, and the registry whose aliases decide what is served.

The database is `runs/mlflow.db` unless `MLFLOW_TRACKING_URI` names another one or a server. Only the driver of a job writes to
it: workers send their numbers to the driver, so a cluster's nodes need no access to the database and never race for it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis

from molmo_core.config import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

RUNS = Path("runs")
CHECKPOINT_FOLDER = "checkpoint"
EVALUATION = "evaluation/"
"""Metrics of evaluations begin with this; they are shares of 1."""
# How MLflow's pages tell model training from agents and prompts.
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
# What MLflow's databases hold of a parameter's value, and its log_batch of parameters at once.
MAX_VALUE, MAX_PARAMS = 6000, 100


class TrackingError(ConfigError):
    """The tracking database or registry does not hold what was asked for, or cannot be reached."""


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the sqlite database under `runs/` of the current folder (as an absolute path)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{RUNS.absolute() / 'mlflow.db'}"


def client() -> mlflow.MlflowClient:
    """A client of the tracking store and registry; creates the database on first use.

    Sets `MLFLOW_TRACKING_URI`, so that processes started from here (a local cluster's workers) use the same store.
    """
    uri = tracking_uri()
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    if not uri.startswith("sqlite:"):
        return mlflow.MlflowClient()
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    # Several processes that create the tables at once break each other.
    with open(database.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        opened = mlflow.MlflowClient()
        opened.search_experiments(max_results=1)
    return opened


class Run:
    """One MLflow run. As a context manager it ends as FINISHED, FAILED (an exception) or KILLED (Ctrl-C)."""

    def __init__(self, experiment: str, name: str, run_id: str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Starts a run, or goes on with `run_id` (a resumed job writes into the run that it began)."""
        self.client = client()
        if run_id:
            try:
                self.client.update_run(run_id, status="RUNNING")
            except MlflowException as error:
                raise TrackingError(f"run {run_id} is not in {tracking_uri()}: {error.message}") from None
            self.id = run_id
        else:
            experiment_id = _experiment(self.client, experiment)
            self.id = self.client.create_run(experiment_id, run_name=name, tags=dict(tags or {})).info.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs a (nested) configuration as dotted parameters. Values logged before stay: MLflow never changes a parameter."""
        known = self.client.get_run(self.id).data.params
        flat = [Param(key, str(value)[:MAX_VALUE]) for key, value in flatten(params).items() if key not in known]
        for start in range(0, len(flat), MAX_PARAMS):
            self.client.log_batch(self.id, params=flat[start : start + MAX_PARAMS])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        now = get_current_time_millis()
        self.client.log_batch(self.id, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()])

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Copies a file, or a folder's content, into the run's artifacts."""
        log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
        log(self.id, str(path), folder)

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
        self.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED")


def _experiment(opened: mlflow.MlflowClient, name: str) -> str:
    found = opened.get_experiment_by_name(name)
    if found:
        if found.lifecycle_stage != "active":
            raise TrackingError(f"experiment {name!r} was deleted in {tracking_uri()}; restore it (`mlflow experiments restore`) or rename")
        return found.experiment_id
    uri = tracking_uri()
    if not uri.startswith("sqlite:"):  # a server decides itself where artifacts go
        return opened.create_experiment(name, tags=TRAINING_PAGES)
    folder = re.sub(r"[^\w.-]+", "_", name)
    artifacts = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts" / folder
    return opened.create_experiment(name, artifact_location=artifacts.as_uri(), tags=TRAINING_PAGES)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def register(checkpoint: str | Path, name: str, alias: str | None = None, run_id: str | None = None) -> str:
    """Puts a checkpoint folder into the registry as a new version of a model.

    Args:
        checkpoint: a self-contained folder (weights, configuration, tokenizer).
        name: the registered model; created on first use.
        alias: moves this alias (`champion`, `candidate`, ...) to the new version.
        run_id: the training run that the version belongs to; None = a run of its own in the experiment `registry`.

    Returns:
        The version. It is `models:/<name>/<version>` from then on.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "config.yaml").is_file() or not any(checkpoint.glob("*.safetensors")):
        raise TrackingError(f"{checkpoint}: not a checkpoint folder (config.yaml and *.safetensors expected)")
    opened = client()
    if run_id is None:
        with Run("registry", f"register {name}") as run:
            run_id = run.id
    try:
        opened.log_artifacts(run_id, str(checkpoint), CHECKPOINT_FOLDER)
        if not _exists(opened, name):
            opened.create_registered_model(name)
        source, scores = f"runs:/{run_id}/{CHECKPOINT_FOLDER}", _scores(opened, run_id)
        version = opened.create_model_version(name, source=source, run_id=run_id, description=scores).version
        if alias:
            opened.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise TrackingError(f"cannot register {checkpoint} as {name!r} in {tracking_uri()}: {error.message}") from None
    return str(version)


def _scores(opened: mlflow.MlflowClient, run_id: str) -> str | None:
    """The evaluation of a run in a line, as the description of the version that comes from it."""
    metrics = opened.get_run(run_id).data.metrics
    scores = [f"{key.removeprefix(EVALUATION)} {value:.1%}" for key, value in sorted(metrics.items()) if key.startswith(EVALUATION)]
    return f"Evaluation: {', '.join(scores)}" if scores else None


def _exists(opened: mlflow.MlflowClient, name: str) -> bool:
    try:
        opened.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def resolve(uri: str | Path) -> Path:
    """The local folder of a model: `models:/<name>@<alias>`, `models:/<name>/<version>`, or a folder as it is.

    Artifacts on this machine's disk are used in place; others are downloaded once, into `runs/models/<name>/<version>`.

    Raises:
        TrackingError: no such model, alias or version (the message lists what there is), or no such folder.
    """
    text = str(uri)
    if not text.startswith("models:/"):
        if not Path(text).is_dir():
            raise TrackingError(f"{text}: no such checkpoint folder (a registered model is written models:/name@alias)")
        return Path(text)
    opened = client()
    name, version = _version(opened, text)
    source = opened.get_model_version_download_uri(name, version)
    if match := re.fullmatch(r"runs:/([^/]+)/(.+)", source):
        source = f"{opened.get_run(match[1]).info.artifact_uri}/{match[2]}"
    if source.startswith(("file:", "/")):
        folder = Path(source.removeprefix("file://"))
        if not folder.is_dir():
            raise TrackingError(f"{text}: version {version} of {name!r} points to {folder}, which is gone")
        return folder
    cache = RUNS.absolute() / "models" / name / version
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as partial:
            Path(mlflow.artifacts.download_artifacts(source, dst_path=partial)).rename(cache)
    return cache


def versioned(uri: str) -> str:
    """The address of a registered model with its version in place of an alias: it stays the same when the alias moves."""
    name, version = _version(client(), uri)
    return f"models:/{name}/{version}"


def _version(opened: mlflow.MlflowClient, uri: str) -> tuple[str, str]:
    """Name and version of a `models:/` address."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/]+)|/(\d+))", uri)
    if not match:
        raise TrackingError(f"{uri}: a registered model is written models:/name@alias or models:/name/version")
    name, alias, version = match.groups()
    if not _exists(opened, name):
        names = [model.name for model in opened.search_registered_models(max_results=20)]
        raise TrackingError(f"{uri}: no registered model {name!r} in {tracking_uri()}. There are: {', '.join(names) or 'none'}")
    model = opened.get_registered_model(name)
    if version:
        try:
            return name, str(opened.get_model_version(name, version).version)
        except MlflowException as error:
            raise TrackingError(f"{uri}: {error.message}") from None
    if alias not in model.aliases:
        raise TrackingError(f"{uri}: {name!r} has no alias {alias!r}. There are: {', '.join(sorted(model.aliases)) or 'none'}")
    return name, str(model.aliases[alias])
