"""How often each dataset is drawn: fixed shares for groups, square root of size inside a group (published Molmo recipes)."""

from __future__ import annotations

import numpy as np

from molmo_core.config import ConfigError
from pipelines.data.config import DatasetConfig, GroupConfig


def counted_size(config: DatasetConfig, size: int) -> float:
    """The size that counts: all examples, a number given in their place (`sampling_size` > 1), or a share of the examples (<= 1)."""
    if config.sampling_size is None:
        return float(size)
    return size * config.sampling_size if config.sampling_size <= 1 else config.sampling_size


def rates(groups: dict[str, GroupConfig], sizes: dict[str, int]) -> dict[str, float]:
    """Probability of each dataset; they sum to 1.

    Args:
        groups: the mixture; dataset names are unique over all groups.
        sizes: examples of each dataset.

    Raises:
        ConfigError: an empty group or dataset, a weight that is not positive, or a name used twice.
    """
    result: dict[str, float] = {}
    total = sum(group.weight for group in groups.values())
    for name, group in groups.items():
        if not group.datasets or group.weight <= 0:
            raise ConfigError(f"data.groups.{name}: needs at least one dataset and a positive weight")
        roots = {}
        for dataset, config in group.datasets.items():
            if dataset in result or dataset in roots:
                raise ConfigError(f"data.groups.{name}: dataset {dataset!r} is in another group already; give it another name")
            if not sizes[dataset] or config.sampling_rate <= 0 or (config.sampling_size is not None and config.sampling_size <= 0):
                raise ConfigError(f"dataset {dataset!r}: no examples, or a sampling_size or sampling_rate that is not positive")
            roots[dataset] = float(np.sqrt(counted_size(config, sizes[dataset]))) * config.sampling_rate
        share = sum(roots.values())
        result |= {dataset: group.weight / total * root / share for dataset, root in roots.items()}
    return result
