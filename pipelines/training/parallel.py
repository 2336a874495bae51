"""One model over many processes: built, sharded (FSDP2) and filled with weights, on gloo and CPUs as on NCCL and GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from molmo_core.checkpoint.backbones import initialise_backbones
from molmo_core.checkpoint.loading import begin_from
from molmo_core.models.base import ModelBase
from pipelines.training.config import Precision, TrainConfig
from pipelines.training.optim import freeze

# Below this number of parameters the whole model is one unit of FSDP: gathering all of it once costs less than many small messages.
ONE_UNIT = 50_000_000

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def build(config: TrainConfig, device: torch.device) -> ModelBase:
    """The model in training mode: frozen, checkpointed, compiled and sharded as configured, with its first weights.

    New weights depend on the seed only, not on the number of processes: the first process draws them and hands them out.
    """
    first = rank() == 0
    drawn = config.init_from is None
    torch.manual_seed(config.seed)
    with torch.device("cpu" if first and drawn else "meta"):
        model = config.model.build_model()
    if config.precision == "bf16":
        model.to(torch.bfloat16)
    weights = model.state_dict() if drawn else {}
    freeze(model, config)
    model.apply_activation_checkpointing(config.activation_checkpointing)
    if config.compile:
        model.apply_compile(dynamic=False)
    if world_size() > 1:
        shard(model, config.precision)
        model.to_empty(device=device)
    elif drawn:
        model.to(device)
    else:
        model.to_empty(device=device)
    if config.init_from is not None:
        begin_from(model, config.init_from)
        return model.train()
    if world_size() > 1:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights if first else {}, options=options)
    initialise_backbones(model)
    return model.train()


def shard(model: ModelBase, precision: Precision) -> None:
    """Shards parameters, gradients and optimiser state over all processes (`fully_shard`)."""
    if precision == "amp_bf16":
        # Inputs are not cast: rotary tables and masks stay in float32, autocast casts where it is right.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    else:
        policy = MixedPrecisionPolicy()
    if model.num_params() < ONE_UNIT:
        fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    else:
        model.apply_fsdp2(mp_policy=policy)
    register_fsdp_forward_method(model, "generate")


@contextlib.contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """bfloat16 arithmetic for `amp_bf16`, else nothing."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "amp_bf16"):
        yield


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def first(make: Callable[[], T]) -> T:
    """What the first rank makes, on all ranks."""
    values = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def together(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What `act` gives on each rank; if it fails on one, all raise its error."""
    result: T | None = None
    problem: Exception | None = None
    try:
        result = act()
    except Exception as error:
        problem = error
    both = gathered((result, problem), group)
    for _, failed in both:
        if failed is not None:
            raise failed
    return [value for value, _ in both]  # type: ignore[misc]
