"""What a run measures: means over the steps since the last log, tokens in all, and how fast the steps are."""

from __future__ import annotations

import time
from typing import Any

import torch

from pipelines.training.flops import StepFlops, peak_flops
from pipelines.training.parallel import world_size


class Meter:
    """Counts over all ranks.

    Rates (`tokens_per_second`, `mfu`, `data_wait`) are those of the steps themselves: validation, sampling, saving and loading lie
    between `end` and `begin`. The first step of a process, which compiles and waits for the first batch, has none; where nothing else
    was measured, they are left out.
    """

    SUMS = ("cross_entropy", "z_loss", "accuracy", "loss_weight", "tokens", "flops")

    def __init__(self, model: Any, device: torch.device):
        self.device = device
        self.flops = StepFlops(model)
        self.peak = peak_flops(device)
        self.tokens = 0
        """Of the whole run, earlier processes included."""
        self._warm = False
        self._step = torch.zeros(len(self.SUMS), device=device)
        self._last = torch.zeros(len(self.SUMS))
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(self.SUMS), dtype=torch.float64)
        self._timed = torch.zeros(len(self.SUMS), dtype=torch.float64)
        """The sums of the steps whose time counts."""
        self._seconds = self._wait = 0.0

    def begin(self) -> None:
        """A step begins: it waits for its batch."""
        self._began = time.perf_counter()

    def has_batch(self) -> None:
        self._batch_after = time.perf_counter() - self._began

    def add(self, batch: dict[str, torch.Tensor], output: Any) -> None:
        """Counts a micro-batch of this rank."""
        metrics = output.metrics
        weight = metrics["loss_weight"]
        means = torch.stack([metrics[name].float() for name in self.SUMS[:3]]) * weight
        tokens = (batch["input_ids"] >= 0).sum().float()
        counts = torch.stack([weight.float(), tokens.to(self.device), torch.tensor(self.flops(batch) / 1e12, device=self.device)])
        self._step += torch.cat([means, counts])

    def step_sums(self) -> torch.Tensor:
        """What this rank counted in the step."""
        return self._step

    def has_sums(self, totals: torch.Tensor) -> None:
        """Takes the sums of the step over all ranks."""
        self._last = totals.double().cpu()
        self._step = torch.zeros_like(self._step)

    def last_loss(self) -> float:
        return (self._last[0] / self._last[3]).item()

    def end(self) -> None:
        """The step is taken."""
        self._sums += self._last
        self.tokens += int(self._last[self.SUMS.index("tokens")])
        if self._warm:
            self._timed += self._last
            self._seconds += time.perf_counter() - self._began
            self._wait += self._batch_after
        self._warm = True

    def means(self) -> dict[str, float]:
        """What is logged; begins a new interval."""
        sums, timed = (dict(zip(self.SUMS, values.tolist())) for values in (self._sums, self._timed))
        values = {
            "loss": sums["cross_entropy"] / sums["loss_weight"],
            "z_loss": sums["z_loss"] / sums["loss_weight"],
            "accuracy": sums["accuracy"] / sums["loss_weight"],
            "tokens": float(self.tokens),
        }
        if self._seconds:
            values["tokens_per_second"] = timed["tokens"] / self._seconds
            values["data_wait"] = self._wait / self._seconds
        if self.peak:
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if self._seconds:
                values["mfu"] = timed["flops"] * 1e12 / self._seconds / world_size() / self.peak
        self._reset()
        return values
