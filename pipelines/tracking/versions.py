"""Versions of registered models: a checkpoint becomes one, and is found again by version or alias."""

from __future__ import annotations

import itertools
import re
import tempfile
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.utils import validation
from mlflow.utils.file_utils import local_file_uri_to_path

from molmo_core.checkpoint.folder import adapted_base, locate
from molmo_core.registry import BaseModelConfig
from pipelines.names import file_name, masked
from pipelines.tracking.names import MAX_NAME, TrackingError, check_name, check_names
from pipelines.tracking.places import RUNS, client, tracking_uri
from pipelines.tracking.runs import EVALUATION, Run

MODEL_FOLDER = "model"
"""A version's folder among the artifacts of its run."""
CHECKPOINT = "data/checkpoint"
"""The checkpoint in that folder; MLflow's own files (MLmodel, requirements, ...) are beside it."""
CHECKPOINT_TAG = "checkpoint"
"""A version's tag that says so. Versions without it are from before; their folder is the checkpoint."""


def register(
    checkpoint: str | Path,
    name: str,
    alias: str | None = None,
    run_id: str | None = None,
    beside: Path | None = None,
    description: str | None = None,
) -> str:
    """Puts a checkpoint folder into the registry as a new version of a model.

    Args:
        checkpoint: a self-contained folder (weights, configuration, tokenizer), own or published; it is registered as it is.
        name: the registered model; created on first use.
        alias: moves this alias (`champion`, `candidate`, ...) to the new version.
        run_id: the training run that the version belongs to; None = a run of its own in the experiment `registry`.
        beside: a folder with what else belongs to the version (`pipelines.registry.package` makes it).
        description: of the version; None = the evaluation that its run has logged.

    Returns:
        The version. It is `models:/<name>/<version>` from then on.

    Raises:
        TrackingError: not a checkpoint, no such run, names that MLflow refuses. Then no version and no new model are there.
    """
    checkpoint = Path(checkpoint)
    check_checkpoint(checkpoint)
    check_names(name, alias)
    opened = client()
    try:
        if run_id is not None:
            return _add_version(opened, checkpoint, name, alias, run_id, beside, description)
        with Run("registry", f"register {name}") as run:
            return _add_version(opened, checkpoint, name, alias, run.id, beside, description)
    except MlflowException as error:
        raise TrackingError(f"cannot register {checkpoint} as {name!r} in {masked(tracking_uri())}: {error.message}") from None


def check_checkpoint(checkpoint: Path) -> None:
    """Raises ConfigError for what is not a checkpoint with weights, and says what it is."""
    BaseModelConfig.load(locate(checkpoint))
    if adapted_base(checkpoint) is not None:
        raise TrackingError(
            f"{checkpoint}: adapters; a version of a registered model is complete in itself. Register the trained model beside them, or "
            f"the merged one that `python -m jobs.export {checkpoint} OUT --format native` writes"
        )
    if not any(checkpoint.glob("*.safetensors")):
        raise TrackingError(f"{checkpoint}: not a checkpoint folder (there are no weights, *.safetensors)")


def _add_version(
    opened: mlflow.MlflowClient, checkpoint: Path, name: str, alias: str | None, run_id: str, beside: Path | None, description: str | None
) -> str:
    taken = {artifact.path for artifact in opened.list_artifacts(run_id)}
    # A training run may give several versions, e.g. of two of its checkpoints.
    folder = next(place for k in itertools.count(1) if (place := MODEL_FOLDER if k == 1 else f"{MODEL_FOLDER}-{k}") not in taken)
    opened.log_artifacts(run_id, str(checkpoint), f"{folder}/{CHECKPOINT}")
    if beside is not None:
        opened.log_artifacts(run_id, str(beside), folder)
    is_new = not _exists(opened, name)
    if is_new:
        opened.create_registered_model(name)
    version = None
    try:
        made = opened.create_model_version(
            name,
            source=f"runs:/{run_id}/{folder}",
            run_id=run_id,
            tags={CHECKPOINT_TAG: CHECKPOINT},
            description=description or _scores(opened, run_id),
        )
        version = str(made.version)
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
    name, version = version_of(opened, text)
    inner = opened.get_model_version(name, version).tags.get(CHECKPOINT_TAG, "")
    source = opened.get_model_version_download_uri(name, version)
    if match := re.fullmatch(r"runs:/([^/]+)/(.+)", source):
        source = f"{opened.get_run(match[1]).info.artifact_uri}/{match[2]}"
    if source.startswith(("file:", "/")):
        folder = Path(local_file_uri_to_path(source)) / inner
        if not folder.is_dir():
            raise TrackingError(f"{text}: version {version} of {name!r} points to {folder}, which is gone")
        return folder
    cache = RUNS.absolute() / "models" / file_name(name) / version
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as partial:
            downloaded = Path(mlflow.artifacts.download_artifacts(f"{source}/{inner}".rstrip("/"), dst_path=partial))
            try:
                downloaded.rename(cache)
            except OSError:
                if not cache.is_dir():  # else another process was faster: replicas of a server start together
                    raise
    return cache


def versioned(uri: str) -> str:
    """The address of a registered model with its version in place of an alias: it stays the same when the alias moves."""
    name, version = version_of(client(), uri)
    return f"models:/{name}/{version}"


def version_of(opened: mlflow.MlflowClient, uri: str) -> tuple[str, str]:
    """Name and version of a `models:/` address; raises TrackingError as `resolve` does."""
    match = re.fullmatch(r"models:/([^/]+)(?:@([^/@]+)|/(\d+))", uri)
    if not match:
        raise TrackingError(f"{uri}: a registered model is written models:/name@alias or models:/name/version")
    name, alias, version = match.groups()
    check_name("model", name, validation._validate_model_name, MAX_NAME)
    check_model(opened, name, f"{uri}: ")
    model = opened.get_registered_model(name)
    if version:
        try:
            return name, str(opened.get_model_version(name, version).version)
        except MlflowException as error:
            raise TrackingError(f"{uri}: {error.message}") from None
    if alias not in model.aliases:
        raise TrackingError(f"{uri}: {name!r} has no alias {alias!r}. There are: {', '.join(sorted(model.aliases)) or 'none'}")
    return name, str(model.aliases[alias])


def check_model(opened: mlflow.MlflowClient, name: str, before: str = "") -> None:
    """Raises TrackingError if there is no such registered model, with the names of those that there are; `before` is its beginning."""
    if not _exists(opened, name):
        names = [model.name for model in opened.search_registered_models(max_results=20)]
        there = ", ".join(names) or "none yet (`make demo` trains and registers a small one, `molmo register` one of yours)"
        raise TrackingError(f"{before}no registered model {name!r} in {masked(tracking_uri())}. There are: {there}")
