"""How the workers of a run divide its work: the configuration, without torch."""

from __future__ import annotations

import dataclasses

from molmo_core.config import BaseConfig, ConfigError, Size


@dataclasses.dataclass
class ParallelConfig(BaseConfig):
    """How workers divide the work: num_workers = replicate · shard · context. `shard` is what is left; docs/scaling.md has the numbers."""

    replicate: Size = 1
    """Hybrid sharding: so many groups of workers hold a whole model each, and only sums of gradients travel between the groups. For
    several hosts, one group a host: parameters then travel inside a host only."""
    context: Size = 1
    """Workers, neighbours on a host, that share each sequence (context parallelism), for sequences too long for one."""
    unit_blocks: Size | None = None
    """Blocks of the language model whose parameters are gathered together; None = as many as make 200M parameters, and a model under 50M
    is gathered whole."""
    vision_unit: bool = False
    """Gather the vision encoder for itself; otherwise together with the embeddings."""
    reshard_after_forward: bool | None = None
    """Free gathered parameters between forward and backward pass, and gather them again; None = if they would take more than half of what
    weights, gradients and optimiser leave of the memory."""
    whole_gradients: bool = False
    """With several forward passes a step: keep whole gradients until the last one, and reduce them once. Takes a whole model's memory."""

    def shard(self, workers: int) -> int:
        """Workers that hold one model together, each the context of others or not.

        Raises:
            ConfigError: the numbers do not divide the workers.
        """
        shard, rest = divmod(workers, self.replicate * self.context)
        if rest:
            raise ConfigError(
                f"num_workers={workers} is not a multiple of parallel.replicate · parallel.context = {self.replicate} · {self.context}"
            )
        return shard
