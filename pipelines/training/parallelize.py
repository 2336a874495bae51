"""A model made ready to train on many devices: one pass, in the order that each part needs.

    (LoRA →) share sequences → float8 → recompute → compile → shard

Adapters come before the pass: what is trained (`optim.freeze`) has to be known by the time of sharding.

A block is compiled together with what it recomputes, and sharded outside of both: its parameters are gathered before the compiled code
runs, so that this is the same on any number of ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from molmo_core.config import ConfigError
from molmo_core.models.base import ModelBase
from molmo_core.nn.llm import Block
from pipelines.training.config import Precision, TrainConfig
from pipelines.training.mesh import Mesh
from pipelines.training.parallel import first

# Below this number of parameters the whole model is one unit of FSDP: gathering all of it once costs less than many small messages.
ONE_UNIT = 50_000_000
# A unit of about so many parameters (two blocks at 4B) was the fastest on two GPUs: fewer calls of the host, and still some to overlap.
UNIT = 200_000_000


def parallelize(model: ModelBase, mesh: Mesh, config: TrainConfig, device: torch.device) -> None:
    """Makes a model, which may be on the meta device, ready to train on `device` as one rank of `mesh`.

    Raises:
        ConfigError: ranks cannot share sequences of this model; it, or the device, cannot compute in float8.
    """
    if mesh.sequence is not None:
        share_context(model, mesh.sequence)
    if config.float8:
        use_float8(model, device)
    model.apply_activation_checkpointing(config.activation_checkpointing)
    if config.compile:
        model.apply_compile()
    if mesh.weights is not None:
        shard(model, mesh, config, device)


def share_context(model: ModelBase, group: dist.ProcessGroup) -> None:
    """`Molmo.share_context`, with the setting's name in its error."""
    try:
        model.share_context(group)  # type: ignore[operator]
    except ValueError as error:
        raise ConfigError(f"parallel.context: {error}") from None


def use_float8(model: ModelBase, device: torch.device) -> None:
    """`ModelBase.apply_float8`, with the setting's name in its error; refuses GPUs that have no products in float8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"float8: {torch.cuda.get_device_name(device)} has no products in float8; Ada, Hopper and later GPUs have")
    try:
        model.apply_float8()
    except ValueError as error:
        raise ConfigError(f"float8: {error}") from None


def shard(model: ModelBase, mesh: Mesh, config: TrainConfig, device: torch.device) -> None:
    """Shards parameters, gradients and optimiser state over the mesh (`fully_shard`)."""
    policy, settings = mixed_precision(config.precision), config.parallel
    blocks = settings.unit_blocks or unit_blocks(model)
    reshard = settings.reshard_after_forward
    if reshard is None:
        reshard = not may_stay_gathered(model, mesh, config.precision, device)
    if blocks is None:
        fully_shard(model, mesh=mesh.weights, mp_policy=policy, reshard_after_forward=False)
    else:
        model.apply_fsdp2(mesh.weights, policy, reshard, unit_blocks=blocks, vision_unit=settings.vision_unit)
    register_fsdp_forward_method(model, "generate")


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """What parameters are gathered in, and gradients reduced in."""
    if precision == "amp_bf16":
        # Inputs are not cast: rotary tables and masks stay in float32, autocast casts where it is right.
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


def unit_blocks(model: ModelBase) -> int | None:
    """Blocks of the language model that a unit has by default; None = the model is one unit."""
    if model.num_params() < ONE_UNIT:
        return None
    block = next(sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block))
    return max(1, round(UNIT / block))


def may_stay_gathered(model: ModelBase, mesh: Mesh, precision: Precision, device: torch.device) -> bool:
    """Whether all gathered parameters take at most half of what weights, gradients and two moments leave of the memory."""
    if device.type != "cuda":
        return True  # models that CPUs train are small
    memory = first(lambda: torch.cuda.get_device_properties(device).total_memory)  # on unlike hosts, too, all ranks do the same
    stored, gathered = 2 if precision == "bf16" else 4, 4 if precision == "fp32" else 2
    parameters = model.num_params()
    left = memory - 4 * stored * parameters // (mesh.shard * mesh.context)
    return gathered * parameters <= left // 2


def begin_micro_batch(model: ModelBase, config: TrainConfig, last: bool) -> None:
    """Tells a sharded model whether the next backward pass ends the step: until then less has to travel.

    Replicas add up their gradients in the last pass only. With `parallel.whole_gradients` shards do so, too, and parameters stay gathered.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(last)
    model.set_requires_all_reduce(last)
    if config.parallel.whole_gradients:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
