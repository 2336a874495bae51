"""What every worker does: the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from molmo_core.config import ConfigError
from pipelines.training.checkpointing import Checkpointer, merged
from pipelines.training.config import TrainConfig
from pipelines.training.errors import NonFiniteError, TrainingError
from pipelines.training.events import Done, Failed, Metrics, Note, Samples, Saved, Started, Stopped
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import all_sum, autocast, build, rank, world_size
from pipelines.training.progress import Reporter
from pipelines.training.storage import Storage, step_name
from pipelines.training.validation import Sampler, Validator

Batch = dict[str, torch.Tensor]
MAX_SEED = 2**63


def train_worker(job: dict[str, Any]) -> None:
    """Runs one worker of a Ray Train run.

    Args:
        job: `config` (TrainConfig), `loader` (makes the batches, see `TrainLoader`) and `inbox` (see `progress`).
    """
    reporter = Reporter(job["inbox"] if rank() == 0 else None)
    try:
        train(job["config"], job["loader"], reporter)
    except (ConfigError, TrainingError) as error:
        # Another try would end the same way, so Ray Train must not see a failure: the driver raises this.
        reporter = Reporter(job["inbox"])
        reporter.send(Failed(error.with_traceback(None)))
    reporter.flush()


def train(config: TrainConfig, make_loader: Any, reporter: Reporter) -> None:
    """Trains from the newest whole checkpoint, or the beginning, to the last step."""
    device = ray.train.torch.get_device()
    model = build(config, device)
    optimizer = Optimizer(model, config.optim)
    sizes = {"global_batch_size": config.global_batch_size, "sequence_length": config.sequence_length}
    loader = make_loader(config.data, config.model, **sizes, seed=config.seed, rank=rank(), world_size=world_size())
    validator = Validator(config, make_loader, model, device) if config.validation else None
    sampler = Sampler(config, model, lambda text: reporter.send(Note(text))) if config.samples else None
    meter = Meter(model, device)
    checkpointer = Checkpointer(model, optimizer, Storage(config.storage, config.name), config.checkpoint.keep)

    start = 0
    state = checkpointer.resume(lambda text: reporter.send(Note(text)))
    if state is not None:
        loader.load_state_dict(state["loader"])
        start, meter.tokens = state["step"], state["tokens"]
    saved, stopped = start, False
    reporter.send(Started(start))
    batches = iter(loader)

    for step in range(start + 1, config.steps + 1):
        torch.manual_seed((config.seed * 1_000_003 + step * 65_537 + rank()) % MAX_SEED)  # dropout: a resumed step is the same step
        meter.begin()
        batch = next(batches)
        meter.has_batch()

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
        meter.has_sums(totals[len(sums) :])
        if not all(math.isfinite(value) for value in totals.tolist()):
            raise NonFiniteError(not_finite(step, meter.last_loss(), norms, saved, loader))
        optimizer.clip(norms)
        rates = optimizer.set_learning_rates(step, config.steps)
        optimizer.step()
        optimizer.zero_grad()
        meter.end()

        last, stopped = step == config.steps, stop > 0
        if step % config.log_interval == 0 or last:
            reporter.send(Metrics(step, meter.means() | rates | {f"grad_norm/{group}": norm.item() for group, norm in norms.items()}))
        if validator is not None and (step % config.validation.interval == 0 or last):  # type: ignore[union-attr]
            reporter.send(Metrics(step, validator.run()))
        if sampler is not None and (step % config.samples.interval == 0 or last):  # type: ignore[union-attr]
            reporter.send(Samples(step, sampler.run()))
        if step % config.checkpoint.interval == 0 or last or stopped:
            checkpointer.save({"step": step, "tokens": meter.tokens, "loader": merged(loader.state_dict())})
            saved = step
            reporter.send(Saved(step))
        reporter.heartbeat(step)
        if stopped:
            break

    batches.close()
    if saved < config.steps:
        reporter.send(Stopped(saved))
    else:
        # The checkpoint may be an earlier call's: of a run that was to be longer, or that ended before its model was written.
        reporter.send(Done(saved, checkpointer.save_model(saved)))
    if world_size() > 1:
        dist.barrier()  # gloo may abort a rank whose peers are gone while it still tidies up


def not_finite(step: int, loss: float, norms: dict[str, torch.Tensor], saved: int, loader: Any) -> str:
    """The message of a NonFiniteError."""
    parts = ", ".join(f"{group} {norm.item():.4g}" for group, norm in norms.items())
    before = f"the last checkpoint is {step_name(saved)}" if saved else "there is no checkpoint yet"
    return (
        f"step {step}: loss {loss:.4g}, gradient norm {parts}. The step was not taken; {before}. "
        f"Lower the learning rate or look at the batch. {whereabouts(loader)}"
    )


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
