"""What a run measures: means over the steps since the last log, tokens in all, and how fast the steps are."""

from __future__ import annotations

import time
from typing import Any

import torch

from pipelines.training.flops import StepFlops, peak_flops
from pipelines.training.parallel import world_size


class Meter:
    """Counts over all ranks. What the model gives stays on the device until it is logged; what a batch has is known to the host.

    Rates (`tokens_per_second`, `mfu`, `data_wait`) are those of the steps themselves: validation, sampling, saving and loading lie
    between `end` and `begin`. The first step of a process, which compiles and waits for the first batch, has none; where nothing else
    was measured, they are left out.
    """

    SUMS = ("cross_entropy", "z_loss", "accuracy", "loss_weight")

    def __init__(self, model: Any, device: torch.device):
        self.device = device
        self.flops = StepFlops(model)
        self.peak = peak_flops(device)
        self.tokens = 0
        """Of the whole run, earlier processes included."""
        self._warm = False
        self._names = [*self.SUMS, *(f"{name}_{kind}" for name in model.further_losses for kind in ("loss", "acc", "count"))]
        self._further = model.further_losses
        self._step = torch.zeros(len(self._names), device=device)
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=self.device)
        self._timed_tokens = self._timed_flops = self._seconds = self._wait = 0.0
        """Of the steps whose time counts."""

    def begin(self) -> None:
        """A step begins: it waits for its batch."""
        self._began = time.perf_counter()

    def has_batch(self) -> None:
        self._batch_after = time.perf_counter() - self._began

    def counts(self, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Tokens of a batch of this rank, and 1e12 floating-point operations of its step."""
        return float((batch["input_ids"] >= 0).sum()), self.flops(batch) / 1e12

    def add(self, output: Any) -> None:
        """Adds what the model says of a micro-batch of this rank."""
        metrics = output.metrics
        weight = metrics["loss_weight"]
        means = [metrics[name].float() * weight for name in self.SUMS[:3]]
        parts = [*means, weight.float()]
        for name in self._further:
            count = metrics[f"{name}_count"].float()
            parts += [metrics[f"{name}_loss"] * count, metrics[f"{name}_acc"] * count, count]
        self._step += torch.stack(parts)

    def step_sums(self) -> torch.Tensor:
        """What was added in this step; the next one begins with nothing."""
        sums, self._step = self._step, torch.zeros_like(self._step)
        return sums

    @classmethod
    def loss(cls, sums: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy of a step, given its sums: a scalar on the device."""
        return sums[0] / sums[cls.SUMS.index("loss_weight")]

    def end(self, sums: torch.Tensor, left_out: torch.Tensor, tokens: float, teraflops: float) -> None:
        """The step is over.

        Args:
            sums: `step_sums` over all ranks.
            left_out: bool scalar: the step was not taken, and is no part of the means.
            tokens, teraflops: `counts` over all ranks.
        """
        self._sums += torch.where(left_out, 0.0, sums)
        self.tokens += int(tokens)
        if self._warm:
            self._timed_tokens += tokens
            self._timed_flops += teraflops
            self._seconds += time.perf_counter() - self._began
            self._wait += self._batch_after
        self._warm = True

    def means(self) -> dict[str, float]:
        """What is logged; begins a new interval. Waits for the device."""
        began = time.perf_counter()
        sums = dict(zip(self._names, self._sums.tolist()))
        values = {"tokens": float(self.tokens)}
        if sums["loss_weight"]:
            values |= {
                "loss": sums["cross_entropy"] / sums["loss_weight"],
                "z_loss": sums["z_loss"] / sums["loss_weight"],
                "accuracy": sums["accuracy"] / sums["loss_weight"],
            }
        for name in self._further:
            if count := sums[f"{name}_count"]:
                values |= {f"{name}_{kind}": sums[f"{name}_{kind}"] / count for kind in ("loss", "acc")}
        if self._seconds:
            self._seconds += time.perf_counter() - began  # the device was behind the host
            values["tokens_per_second"] = self._timed_tokens / self._seconds
            values["data_wait"] = self._wait / self._seconds
        if self.peak:
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if self._seconds:
                values["mfu"] = self._timed_flops * 1e12 / self._seconds / world_size() / self.peak
        self._reset()
        return values
