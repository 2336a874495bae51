"""A checkpoint into the model registry, as a configuration says."""

from __future__ import annotations

from pipelines import tracking
from pipelines.registry.config import RegisterConfig


def register(config: RegisterConfig) -> dict[str, str]:
    """Registers a checkpoint; returns its `name`, `version`, `alias` and `uri`. Raises TrackingError as `tracking.register` does."""
    version = tracking.register(config.checkpoint, config.name, config.alias, config.run_id)
    uri = f"models:/{config.name}@{config.alias}" if config.alias else f"models:/{config.name}/{version}"
    return {"name": config.name, "version": version, "alias": config.alias or "", "uri": uri}
