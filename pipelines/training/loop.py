"""What every worker does: the training loop."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from molmo_core.config import ConfigError
from pipelines.training.build import build
from pipelines.training.checkpointing import Checkpointer, merged
from pipelines.training.config import TrainConfig
from pipelines.training.ema import Ema
from pipelines.training.errors import TrainingError
from pipelines.training.events import Done, Failed, Metrics, Started, Stopped
from pipelines.training.health import Health, named
from pipelines.training.hooks import Hook
from pipelines.training.mesh import Mesh
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import all_sum, gathered, rank, world_size
from pipelines.training.preemption import Preemption
from pipelines.training.profiler import Profiler
from pipelines.training.progress import Reporter
from pipelines.training.recent import Recent
from pipelines.training.startup import Startup
from pipelines.training.step import TrainStep, loss_weight
from pipelines.training.storage import Storage
from pipelines.training.stuck import StuckWatch
from pipelines.training.validation import Sampler, Validator

MAX_SEED = 2**63


def train_worker(job: dict[str, Any]) -> None:
    """Runs one worker of a Ray Train run.

    Args:
        job: `config` (TrainConfig), `loader` (makes the batches, see `TrainLoader`) and `inbox` (see `progress`).
    """
    reporter = Reporter(job["inbox"] if rank() == 0 else None, alarms=job["inbox"])
    try:
        train(job["config"], job["loader"], reporter)
    except (ConfigError, TrainingError) as error:
        # Another try would end the same way, so Ray Train must not see a failure: the driver raises this.
        reporter = Reporter(job["inbox"])
        reporter.send(Failed(error.with_traceback(None)))
    reporter.flush()


class Known(NamedTuple):
    """What a host knows of a step before the device has worked on it; summed over all ranks, without the devices."""

    weight: float
    """Sum of the loss weights."""
    tokens: float
    teraflops: float
    stop: float
    """1: the run is to stop."""
    written: float
    """1: this rank has written its part of a checkpoint."""
    ask: float
    """1: it is time to ask Ray about preemption."""


def train(config: TrainConfig, make_loader: Any, reporter: Reporter) -> None:
    """Trains from the newest whole checkpoint, or the beginning, to the last step."""
    startup = Startup()
    device = ray.train.torch.get_device()
    mesh = Mesh.of(config, device)
    model = build(config, device, mesh)
    optimizer = Optimizer(model, config.optim)
    startup.done("model")
    sizes = {"global_batch_size": config.global_batch_size, "sequence_length": config.sequence_length}
    loader = make_loader(config.data, config.model, **sizes, seed=config.seed, rank=mesh.data_rank, world_size=mesh.data_size)
    meter = Meter(model, device)
    storage, preemption = Storage(config.storage, config.name), Preemption()
    checkpointer = Checkpointer(model, optimizer, storage, config.checkpoint, reporter.send)
    recent = Recent(reporter.send)
    hooks: list[Hook] = [
        recent,
        StuckWatch(config.stuck_after, reporter.alarm),
        Health(config, device, lambda before: examples(loader, before), reporter.send, checkpointer.newest),
    ]
    if config.profile is not None:
        hooks.append(Profiler(config.profile, storage, reporter.note))
    averaged = None
    if config.ema is not None:
        hooks.append(averaged := Ema(model, config.ema))
    if config.validation is not None:
        hooks.append(Validator(config, make_loader, model, device, mesh, recent.send, averaged))
    if config.samples is not None:
        hooks.append(Sampler(config, model, reporter.send))
    train_step = TrainStep(config, model, optimizer, meter, hooks)

    startup.done("data")
    start = 0
    state = checkpointer.resume(hooks)
    startup.done("checkpoint")
    if state is not None:
        loader.load_state_dict(state["loader"])
        start, meter.tokens = state["step"], state["tokens"]
    reporter.send(Started(start, startup.parts))
    batches = iter(loader)
    try:
        for number in range(start + 1, config.steps + 1):
            torch.manual_seed((config.seed * 1_000_003 + number * 65_537 + rank()) % MAX_SEED)  # dropout: a step has its own
            before = loader.state_dict()
            meter.begin()
            batch = next(batches)
            meter.has_batch()

            counts = (loss_weight(batch), *meter.counts(batch))
            weight, tokens, teraflops = (count / mesh.context for count in counts)  # this rank's share of what several ranks read
            here = Known(weight, tokens, teraflops, reporter.stop_requested, checkpointer.poll(), preemption.due())
            known = Known(*all_sum(torch.tensor(here, dtype=torch.float64)).tolist())
            if known.weight == 0:
                raise ConfigError(f"step {number}: no token of the global batch has a loss weight. {named(examples(loader, before))}")
            step, sums, rates = train_step(number, batch, known.weight, before)
            meter.end(sums, step.left_out, known.tokens, known.teraflops)

            if number % config.log_interval == 0 or step.last:
                values = meter.means() | rates | {f"grad_norm/{group}": norm.item() for group, norm in step.norms.items()}
                for hook in hooks:
                    values |= hook.at_interval()
                recent.send(Metrics(number, values))
            for hook in hooks:
                hook.after_step(step)

            stopped = known.stop > 0
            if known.written == world_size():
                checkpointer.wait()
            notice = preemption.ask() if known.ask else None
            if notice is not None:
                reporter.note(notice)
            if number % config.checkpoint.interval == 0 or step.last or stopped or notice is not None:
                saved = {"step": number, "tokens": meter.tokens, "loader": merged(loader.state_dict())}
                checkpointer.begin(saved, hooks)
            reporter.heartbeat(number)
            if stopped:
                break
        checkpointer.wait(last=True)
    finally:
        batches.close()
        checkpointer.close()
        for hook in hooks:
            hook.close()

    if checkpointer.saved < config.steps:
        reporter.send(Stopped(checkpointer.saved))
    else:
        # The checkpoint may be an earlier call's: of a run that was to be longer, or that ended before its model was written.
        with averaged.exported() if averaged is not None else contextlib.nullcontext():
            if config.lora is not None and config.init_from is not None:
                checkpointer.save_adapters(checkpointer.saved, config.init_from)
            reporter.send(Done(checkpointer.saved, checkpointer.save_model(checkpointer.saved)))
    if world_size() > 1:
        dist.barrier()  # gloo may abort a rank whose peers are gone while it still tidies up


def examples(loader: Any, before: dict[Any, Any]) -> list[str]:
    """Names the examples of all ranks in the step that begins at these states of their loaders, for people. All ranks call it."""
    return list(dict.fromkeys(name for part in gathered(loader.names(before)) for name in part))  # ranks that share sequences say the same
