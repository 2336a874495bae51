"""Puts a checkpoint into the model registry and moves an alias to it."""

from __future__ import annotations

from jobs.command import ConfigPath, Overrides, job
from pipelines.registry.config import RegisterConfig


def main(config: ConfigPath, overrides: Overrides = None) -> None:
    """Registers a checkpoint folder as a new version of a model and moves an alias to it."""
    settings = RegisterConfig.load(config, overrides)
    from pipelines.registry.register import register

    result = register(settings)
    print(f"Registered {result['name']} version {result['version']} as {result['uri']}")


app = job(main, RegisterConfig)

if __name__ == "__main__":
    app()
