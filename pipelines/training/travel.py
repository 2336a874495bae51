"""What travels between GPUs in a training step, and for how long, on paper: bytes of the collectives by speeds of the links."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipelines.training.config import TrainConfig

HOST = 8
"""GPUs of a host."""
NVLINK = 180e9
"""Bytes a second and GPU that a reduction moved inside a host of H100s (measured on two: 4.5 GB in 24 ms; the data sheet says 450e9)."""
NETWORK = 50e9
"""Between hosts: 400 Gb/s a GPU."""


class Travel(NamedTuple):
    """Bytes that one GPU receives in a step."""

    parameters: float
    """Gathered."""
    gradients: float
    """Reduced among the GPUs that hold one model."""
    replicas: float
    """Gradients that are added up between replicas."""
    context: float
    """Keys and values of a sequence's other tokens, and their gradients."""
    seconds: float
    """For all of it, one after the other."""

    def efficiency(self, computing: float) -> tuple[float, float]:
        """Shares of one GPU's speed, given the seconds that a step computes: if nothing travels meanwhile, and if everything can."""
        return computing / (computing + self.seconds), min(1.0, computing / self.seconds) if self.seconds else 1.0


def travel(config: TrainConfig) -> Travel:
    """What a step of a run moves to one of its `num_workers` GPUs; hosts have `HOST` each, neighbours in rank."""
    with torch.device("meta"):
        model = config.model.build_model()
    parallel, workers, llm = config.parallel, config.num_workers, model.config.llm
    sharded = workers // parallel.replicate
    passes = 1 if parallel.whole_gradients else config.micro_batches
    used = 4 if config.precision == "fp32" else 2
    reduced = 2 if config.precision == "bf16" else 4
    whole, trained = model.num_params(), sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = (sharded - 1) / sharded
    parameters = passes * (2 if parallel.reshard_after_forward else 1) * whole * used * others
    gradients = passes * trained * reduced * others
    replicas = 2 * (parallel.replicate - 1) / parallel.replicate * trained * reduced / sharded
    tokens = config.sequence_length * (config.device_batch_size or 1) * config.micro_batches
    keys = 2 * llm.n_layers * llm.kv_heads * llm.head_width * used
    turns = 3 if config.activation_checkpointing == "full" else 2  # forward, again, and the gradients' way back
    context = turns * keys * tokens * (parallel.context - 1) / parallel.context
    inside = NVLINK if sharded <= HOST else NETWORK
    between = NVLINK if workers <= HOST else NETWORK
    beside = NVLINK if parallel.context <= HOST else NETWORK
    seconds = (parameters + gradients) / inside + replicas / between + context / beside
    return Travel(parameters, gradients, replicas, context, seconds)
