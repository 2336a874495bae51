"""Which names MLflow takes for metrics, parameters, models and aliases, and what becomes of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.utils import validation

from molmo_core.config import ConfigError
from pipelines.names import fitting, shortened

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


def level(name: str) -> str:
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
    check_name("name", model, validation._validate_model_name, MAX_NAME)
    if alias is not None:
        for validate in (validation._validate_model_alias_name, validation._validate_model_alias_name_reserved):
            check_name("alias", alias, validate, validation.MAX_REGISTERED_MODEL_ALIAS_LENGTH)


def check_name(what: str, name: str, validate: Callable[[str], Any], limit: int) -> None:
    try:
        validate(name)
    except MlflowException as error:
        raise TrackingError(f"{what}={name!r}: {error.message}") from None
    if not name.isprintable() or len(name) > limit:
        raise TrackingError(f"{what}={name[:300]!r}: must be at most {limit} printable characters")
