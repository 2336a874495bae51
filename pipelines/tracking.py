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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import mlflow
import requests
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils import validation
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.time import get_current_time_millis
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from molmo_core.checkpoint.folder import locate
from molmo_core.config import ConfigError, flatten
from molmo_core.registry import BaseModelConfig
from pipelines import environment
from pipelines.files import is_temporary
from pipelines.names import file_name, fitting, masked, shortened

if TYPE_CHECKING:
    from PIL.Image import Image

environment.defaults(environment.MLFLOW)

RUNS = Path("runs")
CHECKPOINT_FOLDER = "checkpoint"
EVALUATION = "evaluation/"
"""Metrics of evaluations begin with this; they are shares of 1."""
# How MLflow's pages tell model training from agents and prompts.
TRAINING_PAGES = {"mlflow.experimentKind": "custom_model_development"}
CONNECT_TIMEOUT_S = 5
MAX_KEY = validation.MAX_ENTITY_KEY_LENGTH
MAX_NAME, MAX_RUN_NAME = 256, 250
"""Characters of a model's or an experiment's name and of a run's in MLflow's databases (sqlite itself would take more)."""


class TrackingError(ConfigError):
    """The tracking database or registry does not hold what was asked for, or cannot be reached."""


def key(name: str) -> str:
    """Any text as MLflow takes it for a metric; two texts never become one.

    What MLflow takes stays as it is. Otherwise the parts between slashes that it refuses are replaced: `evaluation/vqa@v2` is
    logged as `evaluation/vqa_v2-shad94c285d`.
    """
    return shortened("/".join(fitting(part, _is_key, MAX_KEY) for part in name.split("/")), MAX_KEY)


def _is_key(name: str) -> bool:
    return _accepts(validation._validate_metric_name, name) and _accepts(validation._validate_param_name, name)


def _level(name: str) -> str:
    """One level of a dotted parameter: dots between levels are ours."""
    return fitting(name, lambda text: "." not in text and _is_key(text), MAX_KEY)


def _accepts(validate: Callable[[str], Any], name: str) -> bool:
    try:
        validate(name)
    except MlflowException:
        return False
    return True


def check_names(model: str, alias: str | None = None) -> None:
    """Whether the registry takes a model's name and an alias; to be called before anything is written.

    Raises:
        TrackingError: it does not.
    """
    _check("name", model, validation._validate_model_name, MAX_NAME)
    if alias is not None:
        for validate in (validation._validate_model_alias_name, validation._validate_model_alias_name_reserved):
            _check("alias", alias, validate, validation.MAX_REGISTERED_MODEL_ALIAS_LENGTH)


def _check(what: str, name: str, validate: Callable[[str], Any], limit: int) -> None:
    try:
        validate(name)
    except MlflowException as error:
        raise TrackingError(f"{what}={name!r}: {error.message}") from None
    if not name.isprintable() or len(name) > limit:
        raise TrackingError(f"{what}={name[:300]!r}: must be at most {limit} printable characters")


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the sqlite database `runs/mlflow.db`; a relative path of a database counts from the current folder.

    Raises:
        TrackingError: not an address, or a database that would be deleted with a submitted job's working directory.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = given or _sqlite(RUNS / "mlflow.db")
    if not re.match(r"(?!file:)[\w+.-]+:", uri):
        path = local_file_uri_to_path(uri)
        raise TrackingError(f"MLFLOW_TRACKING_URI={given}: MLflow wants a database or a server, e.g. {_sqlite(Path(path) / 'mlflow.db')}")
    if not uri.startswith("sqlite:"):
        return uri
    database = _database(uri)
    if is_temporary(database):
        raise TrackingError(
            f"MLflow's database would be {database}, in the copy of a submitted job's working directory, which Ray deletes. "
            "`ray job submit` passes on only the variables that it is told: "
            """--runtime-env-json '{"env_vars": {"MLFLOW_TRACKING_URI": "http://..."}}'"""
        )
    return str(make_url(uri).set(database=str(database)))


def _sqlite(database: Path) -> str:
    return str(URL.create("sqlite", database=str(database.absolute())))


def _database(uri: str) -> Path:
    """The file of a sqlite address."""
    try:
        name = make_url(uri).database
    except ArgumentError as error:
        raise TrackingError(f"MLFLOW_TRACKING_URI={masked(uri)}: {error}") from None
    if not name:
        raise TrackingError(f"MLFLOW_TRACKING_URI={masked(uri)}: names no file; write sqlite:///path of the database")
    return Path(name).absolute()


def client() -> mlflow.MlflowClient:
    """A client of the tracking store and registry; creates the database on first use.

    Sets `MLFLOW_TRACKING_URI`, so that processes started from here (a local cluster's workers) use the same store.

    Raises:
        TrackingError: the address is wrong, or nothing answers there.
    """
    uri = tracking_uri()
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    if not uri.startswith("sqlite:"):
        if uri.startswith(("http://", "https://")):
            _check_answers(uri)
        return mlflow.MlflowClient()
    database = _database(uri)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # Several processes that create the tables at once break each other.
        with open(database.with_suffix(".lock"), "w") as lock, open(database, "ab"):
            fcntl.flock(lock, fcntl.LOCK_EX)
            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
            opened = mlflow.MlflowClient()
            opened.search_experiments(max_results=1)
    except OSError as error:
        raise TrackingError(f"MLflow's database {database} cannot be written: {error}") from None
    return opened


def _check_answers(uri: str) -> None:
    """MLflow itself would try again for minutes."""
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=CONNECT_TIMEOUT_S)  # any answer will do
    except requests.RequestException as error:
        problem = "it takes too long" if isinstance(error, requests.Timeout) else "connection refused, or no such host"
        raise TrackingError(f"MLFLOW_TRACKING_URI={masked(uri)}: no MLflow server answers there ({problem})") from None


class Run:
    """One MLflow run. As a context manager it ends as FINISHED, FAILED (an exception) or KILLED (Ctrl-C)."""

    def __init__(self, experiment: str, name: str, run_id: str | None = None) -> None:
        """Starts a run, or continues `run_id` (a resumed job writes into the run that it began).

        Names of runs can be any text. Raises TrackingError: no such run, or an experiment's name that MLflow refuses.
        """
        _check("experiment", experiment, validation._validate_experiment_name, MAX_NAME)
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
        named = {shortened(name, MAX_KEY): value for name, value in flatten(params, _level).items()}
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
    _check("experiment", name, validation._validate_experiment_name, MAX_NAME)
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
    artifacts = _database(uri).parent / "mlartifacts" / file_name(name)
    return opened.create_experiment(name, artifact_location=artifacts.as_uri(), tags=TRAINING_PAGES)


def _text(value: str) -> str:
    """Text that a database takes: without halves of surrogate pairs and zeros."""
    return value.encode("utf-8", "replace").decode().replace("\0", "�")


def register(checkpoint: str | Path, name: str, alias: str | None = None, run_id: str | None = None) -> str:
    """Puts a checkpoint folder into the registry as a new version of a model.

    Args:
        checkpoint: a self-contained folder (weights, configuration, tokenizer), own or published; it is registered as it is.
        name: the registered model; created on first use.
        alias: moves this alias (`champion`, `candidate`, ...) to the new version.
        run_id: the training run that the version belongs to; None = a run of its own in the experiment `registry`.

    Returns:
        The version. It is `models:/<name>/<version>` from then on.

    Raises:
        TrackingError: not a checkpoint, no such run, names that MLflow refuses. Then no version and no new model are there.
    """
    checkpoint = Path(checkpoint)
    BaseModelConfig.load(locate(checkpoint))  # refuses what is not a model, and says what it is
    if not any(checkpoint.glob("*.safetensors")):
        raise TrackingError(f"{checkpoint}: not a checkpoint folder (there are no weights, *.safetensors)")
    check_names(name, alias)
    opened = client()
    try:
        if run_id is not None:
            return _add_version(opened, checkpoint, name, alias, run_id)
        with Run("registry", f"register {name}") as run:
            return _add_version(opened, checkpoint, name, alias, run.id)
    except MlflowException as error:
        raise TrackingError(f"cannot register {checkpoint} as {name!r} in {masked(tracking_uri())}: {error.message}") from None


def _add_version(opened: mlflow.MlflowClient, checkpoint: Path, name: str, alias: str | None, run_id: str) -> str:
    opened.log_artifacts(run_id, str(checkpoint), CHECKPOINT_FOLDER)
    is_new = not _exists(opened, name)
    if is_new:
        opened.create_registered_model(name)
    version = None
    try:
        source, scores = f"runs:/{run_id}/{CHECKPOINT_FOLDER}", _scores(opened, run_id)
        version = str(opened.create_model_version(name, source=source, run_id=run_id, description=scores).version)
        if alias is not None:
            opened.set_registered_model_alias(name, alias, version)
    except MlflowException:
        if version is not None:
            opened.delete_model_version(name, version)
        if is_new:
            opened.delete_registered_model(name)
        raise
    return version


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
        folder = Path(local_file_uri_to_path(source))
        if not folder.is_dir():
            raise TrackingError(f"{text}: version {version} of {name!r} points to {folder}, which is gone")
        return folder
    cache = RUNS.absolute() / "models" / file_name(name) / version
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as partial:
            downloaded = Path(mlflow.artifacts.download_artifacts(source, dst_path=partial))
            try:
                downloaded.rename(cache)
            except OSError:
                if not cache.is_dir():  # else another process was faster: replicas of a server start together
                    raise
    return cache


def versioned(uri: str) -> str:
    """The address of a registered model with its version in place of an alias: it stays the same when the alias moves."""
    name, version = _version(client(), uri)
    return f"models:/{name}/{version}"


def _version(opened: mlflow.MlflowClient, uri: str) -> tuple[str, str]:
    """Name and version of a `models:/` address."""
    match = re.fullmatch(r"models:/([^/]+)(?:@([^/@]+)|/(\d+))", uri)
    if not match:
        raise TrackingError(f"{uri}: a registered model is written models:/name@alias or models:/name/version")
    name, alias, version = match.groups()
    _check("model", name, validation._validate_model_name, MAX_NAME)
    if not _exists(opened, name):
        names = [model.name for model in opened.search_registered_models(max_results=20)]
        there = ", ".join(names) or "none yet (`make demo` trains and registers a small one, `molmo register` one of yours)"
        raise TrackingError(f"{uri}: no registered model {name!r} in {masked(tracking_uri())}. There are: {there}")
    model = opened.get_registered_model(name)
    if version:
        try:
            return name, str(opened.get_model_version(name, version).version)
        except MlflowException as error:
            raise TrackingError(f"{uri}: {error.message}") from None
    if alias not in model.aliases:
        raise TrackingError(f"{uri}: {name!r} has no alias {alias!r}. There are: {', '.join(sorted(model.aliases)) or 'none'}")
    return name, str(model.aliases[alias])
