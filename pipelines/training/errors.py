"""How a run ends that cannot continue, other than by its configuration (`ConfigError`)."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Another try would end the same way. The message says what a person can do; a traceback would add nothing to it."""


class NonFiniteError(TrainingError):
    """The loss or a gradient is infinite or not a number. The step was not taken."""
