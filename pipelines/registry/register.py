"""A checkpoint into the model registry, with all that belongs to it, as a configuration says."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipelines import tracking
from pipelines.registry.config import RegisterConfig
from pipelines.registry.package import package


def register(config: RegisterConfig) -> dict[str, str]:
    """Registers a checkpoint; returns its `name`, `version`, `alias` and `uri`.

    Raises:
        ConfigError: as `tracking.register`, or a report that is not there. Then nothing has been registered.
    """
    tracking.check_names(config.name, config.alias)
    checkpoint = Path(config.checkpoint)
    tracking.check_checkpoint(checkpoint)
    evaluation, data = (Path(path) if path else None for path in (config.evaluation, config.data))
    with tempfile.TemporaryDirectory() as beside:
        scores = package(Path(beside), config.name, checkpoint, config.run_id, evaluation, data)
        version = tracking.register(checkpoint, config.name, config.alias, config.run_id, Path(beside), scores)
    uri = f"models:/{config.name}@{config.alias}" if config.alias else f"models:/{config.name}/{version}"
    return {"name": config.name, "version": version, "alias": config.alias or "", "uri": uri}
