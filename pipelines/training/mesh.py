"""The workers of a run as a grid: who holds which part of the model, of the data and of a sequence."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pipelines.training.config import TrainConfig
from pipelines.training.parallel import rank, world_size


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Ranks counted along replicate, shard and context, the last one fastest: those that share a sequence are neighbours.

    Parameters are sharded over `shard · context` ranks; `replicate` such groups hold the same. The global batch is divided over
    `replicate · shard`, and each sequence of it over `context`.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    weights: DeviceMesh | None = None
    """Of `fully_shard`: [shard · context], or [replicate, shard · context]; None for a single process."""
    sequence: dist.ProcessGroup | None = None
    """The ranks that share this one's sequences, if they are several."""

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device) -> Mesh:
        """The grid of a run; all ranks call it.

        Raises:
            ConfigError: the processes are no multiple of `replicate · context`.
        """
        world, settings = world_size(), config.parallel
        shard = settings.shard(world)
        if world == 1:
            return cls()
        sharded = world // settings.replicate
        shape, names = ((sharded,), ("shard",)) if settings.replicate == 1 else ((settings.replicate, sharded), ("replicate", "shard"))
        weights = init_device_mesh(device.type, shape, mesh_dim_names=names)
        sequence = None
        if settings.context > 1:
            rows = init_device_mesh(device.type, (world // settings.context, settings.context), mesh_dim_names=("data", "context"))
            sequence = rows.get_group("context")
        return cls(settings.replicate, shard, settings.context, weights, sequence)

    @property
    def size(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def data_size(self) -> int:
        """Ranks, or groups of them, that read different sequences."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which of those this rank belongs to."""
        return rank() // self.context
