"""Whether a run's weights, gradients and optimiser states fit into memory: looked at before a machine begins to swap."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from molmo_core.config import ConfigError
from pipelines.training.config import TrainConfig
from pipelines.training.optim import freeze, is_matrix

_SLACK = 0.95
"""The estimate is a lower bound, without activations, and still may not come closer to what there is."""


class Need(NamedTuple):
    """Bytes over all workers, activations not included."""

    parameters: int
    """Number of the model's parameters."""
    trained: int
    """Number of those that are trained."""
    weights: int
    gradients: int
    optimizer: int
    """With the average of the weights, if there is one."""

    @property
    def bytes(self) -> int:
        return self.weights + self.gradients + self.optimizer


def memory_needed(config: TrainConfig) -> Need:
    """What a run holds at least, sharded over all workers. No memory is used for the model."""
    with torch.device("meta"):
        model = config.model.build_model()
    freeze(model, config)
    size = moment = 2 if config.precision == "bf16" else 4
    if config.precision == "bf16" and config.optim.rounding == "stochastic" and config.optim.moments == "float32":
        moment = 4
    parameters = sum(p.numel() for p in model.parameters())
    trained = states = 0
    for group, named in model.parameter_groups().items():
        for name, p in named:
            if p.requires_grad:
                trained += p.numel()
                # Muon keeps a momentum, AdamW two moments.
                if config.optim.of(group).muon_lr is not None and is_matrix(name, p):
                    states += p.numel() * size
                else:
                    states += 2 * p.numel() * moment
    average = trained * 4 if config.ema is not None else 0
    return Need(parameters, trained, parameters * size, trained * size, states + average)


def check_memory(config: TrainConfig) -> None:
    """Refuses a run that cannot fit, on the machine that a cluster will be started on.

    On a GPU each worker's share has to fit into its memory, on CPUs all shares into what is free of the machine's. When a cluster is
    joined, its machines are not known yet, and nothing is checked.

    Raises:
        ConfigError: it does not fit; the message has the numbers.
    """
    import ray  # `memory_needed` does without

    from pipelines import cluster

    if not config.check_memory or os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    on_gpu = gpus >= config.num_workers if config.device == "auto" else config.device == "gpu" and gpus > 0
    need = memory_needed(config)
    copies = config.parallel.replicate
    if on_gpu:
        refuse(need, need.bytes * copies // config.num_workers, torch.cuda.get_device_properties(0).total_memory, "in a GPU's memory of")
    else:
        refuse(need, need.bytes * copies, cluster.free_memory(), "in this machine's free memory of")


def refuse(need: Need, share: int, available: int, where: str) -> None:
    """Raises ConfigError if `share` bytes of what is needed do not fit into `available` ones."""
    if share <= available * _SLACK:
        return
    raise ConfigError(
        f"training needs at least {_gb(need.bytes)}: weights {_gb(need.weights)} ({need.parameters:,} parameters), gradients "
        f"{_gb(need.gradients)} ({need.trained:,} are trained), optimiser {_gb(need.optimizer)}; activations come on top. {_gb(share)} of "
        f"that would be {where} {_gb(available)}. Train less of the model (ft_llm=false, ft_vit=false), use more GPUs (num_workers), "
        "precision=bf16 or a smaller model; check_memory=false starts it anyway"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
