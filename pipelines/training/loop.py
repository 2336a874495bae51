"""What every worker does: the training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from molmo_core.config import ConfigError
from pipelines.training import checkpointing
from pipelines.training.config import TrainConfig
from pipelines.training.flops import StepFlops, peak_flops
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import all_sum, autocast, build, rank, world_size
from pipelines.training.progress import Reporter
from pipelines.training.validation import Sampler, Validator

Batch = dict[str, torch.Tensor]
MAX_SEED = 2**63


class NonFiniteError(RuntimeError):
    """The loss or a gradient is infinite or not a number. The step was not taken."""


def train_worker(job: dict[str, Any]) -> None:
    """Runs one worker of a Ray Train run.

    Args:
        job: `config` (TrainConfig), `loader` (makes the batches, see `TrainLoader`) and `inbox` (see `progress`).
    """
    reporter = Reporter(job["inbox"] if rank() == 0 else None)
    try:
        train(job["config"], job["loader"], reporter)
    except (ConfigError, NonFiniteError) as error:
        # Another try would end the same way, so Ray Train must not see a failure: the driver raises this.
        reporter = Reporter(job["inbox"])
        reporter.send("failed", 0, error)
    reporter.flush()


def train(config: TrainConfig, make_loader: Any, reporter: Reporter) -> None:
    """Trains from the latest checkpoint, or the beginning, to the last step."""
    device = ray.train.torch.get_device()
    model = build(config, device)
    optimizer = Optimizer(model, config.optim)
    sizes = {"global_batch_size": config.global_batch_size, "sequence_length": config.sequence_length}
    loader = make_loader(config.data, config.model, **sizes, seed=config.seed, rank=rank(), world_size=world_size())
    validator = Validator(config, make_loader, model, device) if config.validation else None
    sampler = Sampler(config, model) if config.samples else None
    meter = Meter(model, device)

    start, tokens, saved = 0, 0, -1
    state = checkpointing.resume(model, optimizer)
    if state is not None:
        loader.load_state_dict(state["loader"])
        start = saved = state["step"]
        tokens = state["tokens"]
        reporter.send("resumed", start)
    batches = iter(loader)
    stopped = False

    for step in range(start + 1, config.steps + 1):
        torch.manual_seed((config.seed * 1_000_003 + step * 65_537 + rank()) % MAX_SEED)  # dropout: a resumed step is the same step
        waited = time.perf_counter()
        batch = next(batches)
        meter.waited(time.perf_counter() - waited)

        # The divisor is the weight of the whole global batch, the same for all ranks and micro-batches; FSDP averages over ranks.
        weight, stop = all_sum(torch.tensor([loss_weight(batch), float(reporter.stop_requested)], device=device)).tolist()
        if weight == 0:
            raise ConfigError(f"step {step}: no token of the global batch has a loss weight. {whereabouts(loader)}")
        divisor = weight / world_size() / config.micro_batches
        for micro in micro_batches(batch, config.micro_batches):
            with autocast(config.precision, device):
                output = model(**micro, loss_divisor=divisor, z_loss_weight=config.z_loss, return_logits=False)
            (output.loss / config.micro_batches).backward()
            meter.add(micro, output)

        sums = optimizer.squared_norms()
        totals = all_sum(torch.cat([torch.stack(list(sums.values())), meter.step_sums()]))
        norms = dict(zip(sums, totals[: len(sums)].sqrt()))
        meter.step_done(totals[len(sums) :])
        if not all(math.isfinite(value) for value in totals.tolist()):
            parts = ", ".join(f"{group} {norm.item():.4g}" for group, norm in norms.items())
            raise NonFiniteError(
                f"step {step}: loss {meter.last_loss():.4g}, gradient norm {parts}. The step was not taken; the latest checkpoint is good. "
                f"Lower the learning rate or look at the batch. {whereabouts(loader)}"
            )
        optimizer.clip(norms)
        rates = optimizer.set_learning_rates(step, config.steps)
        optimizer.step()
        optimizer.zero_grad()

        last, stopped = step == config.steps, stop > 0
        if step % config.log_interval == 0 or last:
            values = meter.means() | rates | {f"grad_norm/{group}": norm.item() for group, norm in norms.items()}
            tokens += int(values.pop("tokens"))
            reporter.send("metrics", step, values | {"tokens": tokens})
        if validator is not None and (step % config.validation.interval == 0 or last):  # type: ignore[union-attr]
            reporter.send("metrics", step, validator.run())
        if sampler is not None and (step % config.samples.interval == 0 or last):  # type: ignore[union-attr]
            reporter.send("samples", step, sampler.run())
        if step % config.checkpoint.interval == 0 or last or stopped:
            state = {"step": step, "tokens": tokens, "loader": checkpointing.merged(loader.state_dict())}
            checkpointing.save(model, optimizer, state, final=last, wait=stopped)
            saved = step
            reporter.send("checkpoint", step)
        reporter.heartbeat(step)
        if stopped and not last:
            break

    batches.close()
    reporter.send("stopped" if stopped and saved < config.steps else "done", saved)
    if world_size() > 1:
        dist.barrier()  # gloo may abort a rank whose peers are gone while it still tidies up


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


def whereabouts(loader: Any) -> str:
    """Names the batch that a rank works on, for errors."""
    return f"Rank {rank()}, data streams {loader.state_dict()}"


class Meter:
    """Means over the steps since the last log, over all ranks."""

    SUMS = ("cross_entropy", "z_loss", "accuracy", "loss_weight", "tokens", "flops")

    def __init__(self, model: Any, device: torch.device):
        self.device = device
        self.flops = StepFlops(model)
        self.peak = peak_flops(device)
        self._step = torch.zeros(len(self.SUMS), device=device)
        self._last = torch.zeros(len(self.SUMS))
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(self.SUMS), dtype=torch.float64)
        self._wait, self._started = 0.0, time.perf_counter()

    def waited(self, seconds: float) -> None:
        self._wait += seconds

    def add(self, batch: Batch, output: Any) -> None:
        """Counts a micro-batch of this rank."""
        metrics = output.metrics
        weight = metrics["loss_weight"]
        means = torch.stack([metrics[name].float() for name in self.SUMS[:3]]) * weight
        tokens = (batch["input_ids"] >= 0).sum().float()
        counts = torch.stack([weight.float(), tokens.to(self.device), torch.tensor(self.flops(batch) / 1e12, device=self.device)])
        self._step += torch.cat([means, counts])

    def step_sums(self) -> torch.Tensor:
        return self._step

    def step_done(self, totals: torch.Tensor) -> None:
        """Takes the sums of a step over all ranks."""
        self._last = totals.double().cpu()
        self._sums += self._last
        self._step = torch.zeros_like(self._step)

    def last_loss(self) -> float:
        return (self._last[0] / self._last[3]).item()

    def means(self) -> dict[str, float]:
        """What is logged; begins a new interval."""
        sums = dict(zip(self.SUMS, self._sums.tolist()))
        seconds = time.perf_counter() - self._started
        values = {
            "loss": sums["cross_entropy"] / sums["loss_weight"],
            "z_loss": sums["z_loss"] / sums["loss_weight"],
            "accuracy": sums["accuracy"] / sums["loss_weight"],
            "tokens": sums["tokens"],
            "tokens_per_second": sums["tokens"] / seconds,
            "data_wait": self._wait / seconds,
        }
        if self.peak:
            values["mfu"] = sums["flops"] * 1e12 / seconds / world_size() / self.peak
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._reset()
        return values
