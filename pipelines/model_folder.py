"""Where a model's files are, for processes that load it."""

from __future__ import annotations

from pathlib import Path


def model_folder(model: str) -> Path:
    """The local folder of a model: a checkpoint folder as it is, `models:/...` from the registry.

    MLflow takes seconds to import, so workers that are given a folder do without it.
    """
    if not model.startswith("models:/"):
        return Path(model)
    from pipelines import tracking

    return tracking.resolve(model)
