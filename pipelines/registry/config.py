"""Which checkpoint becomes which registered model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from molmo_core.config import BaseConfig, ConfigError


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
    evaluation: str | None = None
    """The output of `jobs.evaluate` for this checkpoint: its figures and pictures go into the model card."""
    data: str | None = None
    """The output of `jobs.prepare` that it was trained on: its report goes with the version."""

    PATHS: ClassVar[tuple[str, ...]] = ("checkpoint", "evaluation", "data")

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in ("checkpoint", "name") if not getattr(self, name)]
        if missing:
            raise ConfigError(f"register: {' and '.join(missing)} must be given (for example {missing[0]}=... on the command line)")
