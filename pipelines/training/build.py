"""The model of a run with its first weights, on every rank."""

from __future__ import annotations

import torch

from molmo_core.checkpoint.backbones import initialise_backbones
from molmo_core.checkpoint.loading import begin_from
from molmo_core.models.base import ModelBase
from pipelines.training.config import TrainConfig
from pipelines.training.draw import draw_adapters, draw_weights
from pipelines.training.mesh import Mesh
from pipelines.training.optim import freeze
from pipelines.training.parallelize import ONE_UNIT, parallelize


def build(config: TrainConfig, device: torch.device, mesh: Mesh) -> ModelBase:
    """The model in training mode: frozen, checkpointed, compiled and sharded as configured, with its first weights.

    A large one never exists whole: a rank draws or reads its own shards. A small one is drawn whole by every rank, on its CPU. Either way
    new weights depend on the seed only, not on the number of ranks.

    Raises:
        ConfigError: nothing would be trained.
        CheckpointError: see `load_checkpoint`.
    """
    with torch.device("meta"):
        model = config.model.build_model()
    torch.manual_seed(config.seed)
    small = config.init_from is None and model.num_params() < ONE_UNIT
    if small:  # as it always was, so that a seed of the demo gives the model that its pages show; nothing would be saved
        model = config.model.build_model()
        model.to(device)
    if config.precision == "bf16":
        model.to(torch.bfloat16)
    freeze(model, config)
    parallelize(model, mesh, config, device)
    if not small:
        model.to_empty(device=device)
    if config.init_from is not None:
        begin_from(model, config.init_from)
        draw_adapters(model, config.seed)
        return model.train()
    if not small:
        draw_weights(model, config.seed)
    initialise_backbones(model)
    return model.train()
