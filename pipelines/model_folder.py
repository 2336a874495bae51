"""Where a model's files are, for the driver of a job and for processes that load it."""

from __future__ import annotations

from pathlib import Path

from molmo_core.checkpoint.folder import locate
from molmo_core.registry import BaseModelConfig

REGISTRY = "models:/"


def model_folder(model: str) -> Path:
    """Where a model is: `models:/...` is the local folder of that version; anything else (folder, file, hub repository) is as it was.

    What is there is for `molmo_core` to say: `BaseModelConfig.load` and `load_model` read every kind.
    MLflow takes seconds to import, so workers that are given a folder do without it.
    """
    if not model.startswith(REGISTRY):
        return Path(model)
    from pipelines import tracking

    return tracking.resolve(model)


def fixed_model(model: str) -> str:
    """A model as every process must find it, also one that starts later: a version in place of an alias, an absolute folder.

    Raises:
        ConfigError: there is no checkpoint of a model of this project; the message says what there is.
    """
    if model.startswith(REGISTRY):
        from pipelines import tracking

        return tracking.versioned(model)
    BaseModelConfig.load(locate(model))
    return str(Path(model).resolve()) if Path(model).exists() else model
