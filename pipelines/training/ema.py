"""An exponential moving average of the weights (Polyak averaging): smoother than the weights of any one step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from molmo_core.models.base import ModelBase
from pipelines.training.config import EmaConfig
from pipelines.training.hooks import Hook, Step


class Ema(Hook):
    """After every step that was taken: average ← decay · average + (1 - decay) · weights. Of what is trained, sharded like it, float32."""

    def __init__(self, model: ModelBase, config: EmaConfig):
        """Begins with the weights as they are now."""
        self.decay, self._export = config.decay, config.export
        weights = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
        self._average = {name: weight.detach().clone().float() for name, weight in weights.items()}  # type: ignore[union-attr]
        # This rank's shards, in one order. Those of the weights stay where they are: optimisers change them in place.
        self._shards = [_shard(weights[name]) for name in self._average]  # type: ignore[arg-type]
        self._averages = [_shard(average) for average in self._average.values()]

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        change = torch._foreach_sub([shard.float() for shard in self._shards], self._averages)
        # Of a step that was left out nothing is taken. Only the device knows whether it was.
        torch._foreach_mul_(change, torch.where(step.left_out, 0.0, 1.0 - self.decay))
        torch._foreach_add_(self._averages, change)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        kept = [shard.clone() for shard in self._shards]
        torch._foreach_copy_(self._shards, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._shards, kept)

    def exported(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that leave with it."""
        return self.applied() if self._export else contextlib.nullcontext()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._average

    def load_state(self, state: dict[str, Any]) -> None:
        if not state:  # the run did without it so far
            torch._foreach_copy_(self._averages, self._shards)

    def state(self) -> dict[str, Any]:
        return {"decay": self.decay}


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
