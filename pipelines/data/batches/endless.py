"""Reading a source that never ends with Ray Data, with what a known version of it needs for that, or plainly."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import ray
from ray.data import DataContext, Dataset, Datasource

PLAIN_ROWS = 2_000
"""Plain Ray Data reads a source that has next to no bytes as far as it can: it is given so many rows at a time."""


@functools.cache
def internals() -> ModuleType | None:
    """`ray_internals`, if the installed Ray is one that it knows; else nothing, with one warning."""
    try:
        from pipelines.data.batches import ray_internals

        ray_internals.check()
    except ImportError as error:
        warnings.warn(
            f"Records are streamed with plain Ray Data, which is slower: what makes it fast does not fit the installed Ray ({error})",
            stacklevel=2,
        )
        return None
    return ray_internals


def read(source: Datasource, rows_ahead: int, context: DataContext) -> Dataset:
    """The rows of a source with a single task, in blocks of one row; `rows_ahead` are read while those who take them are busy.

    Args:
        context: the current one; it is changed.
    """
    if (inside := internals()) is None:
        return ray.data.read_datasource(source, override_num_blocks=1, num_cpus=0)
    inside.configure(context, rows_ahead)
    return inside.read(source, rows_ahead)
