"""Puts a checkpoint into the model registry and moves an alias to it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jobs.command import ConfigPath, Overrides, job
from molmo_core.config import BaseConfig, ConfigError
from pipelines import tracking


@dataclasses.dataclass
class RegisterConfig(BaseConfig):
    """`python -m jobs.register`: which checkpoint becomes which model."""

    checkpoint: str = ""
    """A self-contained folder: weights, configuration, tokenizer."""
    name: str = ""
    """The registered model; created on first use."""
    alias: str | None = "champion"
    """The alias that the new version gets; whoever serves `models:/name@alias` serves it from the next start on."""
    run_id: str | None = None
    """The MLflow run that trained it (None: a run of its own)."""

    PATHS: ClassVar[tuple[str, ...]] = ("checkpoint",)

    def __post_init__(self) -> None:
        missing = [name for name in ("checkpoint", "name") if not getattr(self, name)]
        if missing:
            raise ConfigError(f"register: {' and '.join(missing)} must be given (for example {missing[0]}=... on the command line)")


def register(config: RegisterConfig) -> dict[str, str]:
    """Registers a checkpoint; returns its `name`, `version`, `alias` and `uri`."""
    version = tracking.register(config.checkpoint, config.name, config.alias, config.run_id)
    uri = f"models:/{config.name}@{config.alias}" if config.alias else f"models:/{config.name}/{version}"
    return {"name": config.name, "version": version, "alias": config.alias or "", "uri": uri}


def main(config: ConfigPath, overrides: Overrides = None) -> None:
    """Registers a checkpoint folder as a new version of a model and moves an alias to it."""
    result = register(RegisterConfig.load(config, overrides))
    print(f"Registered {result['name']} version {result['version']} as {result['uri']}")


app = job(main)

if __name__ == "__main__":
    app()
