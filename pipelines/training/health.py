"""Steps that would harm the model: a loss or gradient that is not finite, a loss far above those before it.

Whether a step is one is computed on the device, from sums over all ranks, and the optimiser leaves it out there. The host reads of it one
step later, so that it never waits; before anything is saved, everything is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pipelines.training.config import TrainConfig
from pipelines.training.errors import NonFiniteError
from pipelines.training.events import Event, Unusual
from pipelines.training.hooks import Hook, Later, Step

WINDOW = 128
"""Losses that a spike is measured against."""
SIGMAS = 6.0
MOST_SKIPPED = 10
"""Steps in a row that may be left out."""
MOST_NAMED = 20
"""Examples that a line names."""

Examples = Callable[[dict[Any, Any]], list[str]]


class Health(Hook):
    """Leaves out what would harm, says so, and ends the run where that was asked for."""

    def __init__(
        self, config: TrainConfig, device: torch.device, examples: Examples, send: Callable[[Event], None], where: Callable[[], str]
    ):
        """
        Args:
            config: `on_non_finite`, `on_spike`.
            device: of the model.
            examples: names the examples of all ranks in a step, given this rank's state of the loader before it.
            send: hears of every such step.
            where: says what has been saved, for errors.
        """
        self.config, self.examples, self.send, self.where = config, examples, send, where
        self.skipped = 0
        """Steps left out, of the whole run."""
        self._in_a_row = 0
        self._losses = torch.full((WINDOW,), torch.nan, device=device)
        """Of the last steps that were taken; not a number until there are so many."""
        self._read_later: deque[tuple[Step, Later]] = deque()

    def after_backward(self, step: Step) -> None:
        finite = torch.stack([step.loss, *step.norms.values()]).isfinite().all()
        spread, mean = torch.std_mean(self._losses)
        sigmas = (step.loss - mean) / spread.clamp(min=1e-6)
        spike = sigmas > SIGMAS  # false while the mean is not a number
        step.left_out |= ~finite
        if self.config.on_spike == "skip":
            step.left_out |= spike
        self._losses = torch.where(step.left_out, self._losses, torch.cat([self._losses[1:], step.loss[None]]))
        self._read_later.append((step, Later(torch.stack([finite, spike, sigmas, mean, step.loss, *step.norms.values()]).float())))

    def after_step(self, step: Step) -> None:
        self._read(all_but=1)

    def at_interval(self) -> dict[str, float]:
        self._read()
        return {"skipped_steps": float(self.skipped)} if self.skipped else {}

    def state(self) -> dict[str, Any]:
        self._read()
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "losses": self._losses.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        if state:
            self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
            self._losses = torch.tensor(state["losses"], device=self._losses.device)

    def _read(self, all_but: int = 0) -> None:
        while len(self._read_later) > all_but:
            step, later = self._read_later.popleft()
            finite, spike, sigmas, mean, loss, *norms = later.read()
            left_out = not finite or (spike and self.config.on_spike == "skip")
            self.skipped += bool(left_out)
            self._in_a_row = self._in_a_row + 1 if left_out else 0
            if not finite:
                self._not_finite(step, loss, norms)
            elif spike:
                what = "It was left out." if left_out else "It was taken."
                line = f"loss {loss:.4g} is {sigmas:.1f} standard deviations above the mean {mean:.4g} of the last {WINDOW} steps. {what}"
                self.send(Unusual(step.number, line, self.examples(step.batch)))

    def _not_finite(self, step: Step, loss: float, norms: Iterable[float]) -> None:
        parts = ", ".join(f"{group} {norm:.4g}" for group, norm in zip(step.norms, norms, strict=True))
        line = f"loss {loss:.4g}, gradient norm {parts}. The step was not taken"
        examples = self.examples(step.batch)
        end = f"{self.where()}. Lower the learning rate or look at these examples. {named(examples)}"
        if self.config.on_non_finite == "stop":
            raise NonFiniteError(f"step {step.number}: {line}; {end}")
        if self._in_a_row >= MOST_SKIPPED:
            raise NonFiniteError(f"step {step.number}: {line}, nor were the {MOST_SKIPPED - 1} before it; {end}")
        self.send(Unusual(step.number, f"{line}; training continues.", examples))


def named(examples: list[str]) -> str:
    """A line's list of examples."""
    more = f" and {len(examples) - MOST_NAMED} more" if len(examples) > MOST_NAMED else ""
    return f"Its examples: {', '.join(examples[:MOST_NAMED])}{more}."
