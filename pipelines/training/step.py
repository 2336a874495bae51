"""One optimiser step: forward and backward passes over a batch of the host, clipping, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from molmo_core.inputs import as_batch
from molmo_core.models.base import ModelBase
from pipelines.training.config import TrainConfig
from pipelines.training.hooks import Hook, Step
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import all_sum, autocast, world_size
from pipelines.training.parallelize import begin_micro_batch

Batch = dict[str, torch.Tensor]


class Taken(NamedTuple):
    """What a step gave; tensors are on the device."""

    step: Step
    sums: torch.Tensor
    """`Meter.step_sums` over all ranks."""
    rates: dict[str, float]
    """Learning rates, by what they are logged as."""


class TrainStep:
    """Takes the steps of a run.

    The host only gives work to the device, and is up to a step ahead of it: batches are copied through pinned memory, and what is
    computed for the log or for hooks stays on the device.
    """

    def __init__(self, config: TrainConfig, model: ModelBase, optimizer: Optimizer, meter: Meter, hooks: Sequence[Hook]):
        self.config, self.model, self.optimizer, self.meter, self.hooks = config, model, optimizer, meter, hooks

    def __call__(self, number: int, batch: Batch, weight: float, before: dict[Any, Any]) -> Taken:
        """One step.

        Args:
            number: from 1.
            batch: of this rank, on the host.
            weight: sum of the loss weights of the global batch.
            before: `Step.batch`.
        """
        config = self.config
        # The divisor is the weight of the whole global batch, the same for all ranks and micro-batches; FSDP averages over ranks.
        divisor = weight / world_size() / config.micro_batches
        for i, micro in enumerate(micro_batches(batch, config.micro_batches), start=1):
            begin_micro_batch(self.model, config, last=i == config.micro_batches)
            inputs = as_batch(micro, self.meter.device)
            with autocast(config.precision, self.meter.device):
                output = self.model(**inputs, loss_divisor=divisor, z_loss_weight=config.z_loss, return_logits=False)
            assert output.loss is not None
            (output.loss / config.micro_batches).backward()
            self.meter.add(output)

        return self._update(number, before)

    @torch.no_grad()  # else every part of a sharded gradient that is asked for gets a place in the graph of autograd
    def _update(self, number: int, before: dict[Any, Any]) -> Taken:
        """What follows the backward passes."""
        config, optimizer = self.config, self.optimizer
        squares = optimizer.squared_norms()
        totals = all_sum(torch.cat([torch.stack(list(squares.values())), self.meter.step_sums()]))
        norms, sums = dict(zip(squares, totals[: len(squares)].sqrt())), totals[len(squares) :]
        step = Step(number, number == config.steps, self.meter.loss(sums), norms, before)
        for hook in self.hooks:
            hook.after_backward(step)
        optimizer.clip(norms)
        rates = optimizer.set_learning_rates(number, config.steps)
        optimizer.step(step.left_out)
        optimizer.zero_grad()
        return Taken(step, sums, rates)


def loss_weight(batch: Batch) -> float:
    """Sum of the loss weights of a local batch."""
    return torch.where(batch["labels"] >= 0, batch["loss_masks"].clamp(min=0), 0.0).sum().item()


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """Equal parts of a local batch, along the batch axis."""
    if count == 1:
        yield batch
        return
    size = len(batch["input_ids"]) // count
    for i in range(count):
        yield {key: value[i * size : (i + 1) * size] for key, value in batch.items()}
