"""What Ray Data lacks for a source that never ends: a bound on how far it is read, its pace, and no memory of what is done.

Everything here reaches into Ray Data; nothing else in the project does. `check` says whether the installed version is one that this was
written for; endless.py does without it where it is not.
"""

from __future__ import annotations

import inspect
import warnings

import ray
from ray._common.ray_option_utils import task_options
from ray.data import DataContext, Dataset, Datasource
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.bundle_queue.reordering import ReorderingBundleQueue
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator
from ray.data._internal.execution.streaming_executor_state import OpState
from ray.util.annotations import RayDeprecationWarning

_KNOWN = "2.60."
_GENERATOR_BACKPRESSURE = "_generator_backpressure_num_objects"
_ROWS_AHEAD = "molmo_rows_ahead"
# What is touched below, beside what is imported above.
_TOUCHED: dict[type, tuple[str, ...]] = {
    BackpressurePolicy: ("_topology", "_data_context", "max_task_output_bytes_to_read"),
    MapOperator: ("_output_blocks_stats", "_output_queue", "output_dependencies"),
    OpState: ("total_enqueued_input_blocks",),
    ReorderingBundleQueue: ("_inner", "_current_key", "_finalized_keys"),
}


def check() -> None:
    """Raises ImportError if the installed Ray is another version, or lacks something that is touched here."""
    if not ray.__version__.startswith(_KNOWN):
        raise ImportError(f"it is version {ray.__version__}, {_KNOWN}* is known")
    missing = [f"{kind.__name__}.{name}" for kind, names in _TOUCHED.items() for name in names if not _has(kind, name)]
    if _GENERATOR_BACKPRESSURE not in task_options:
        missing.append(_GENERATOR_BACKPRESSURE)
    if missing:
        raise ImportError(f"it has no {', '.join(missing)}")


def _has(kind: type, name: str) -> bool:
    """Whether instances have an attribute: of their class, or one that a constructor sets."""
    constructors = [vars(base)["__init__"] for base in kind.__mro__ if inspect.isfunction(vars(base).get("__init__"))]
    return hasattr(kind, name) or any(name in constructor.__code__.co_names for constructor in constructors)


def configure(context: DataContext, rows_ahead: int) -> None:
    """Makes a context one for an endless source; its pipelines read `rows_ahead` rows while actors are busy."""
    context.set_config(_ROWS_AHEAD, rows_ahead)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Endless])


def read(source: Datasource, rows_ahead: int) -> Dataset:
    """The rows of a source with a single task, in blocks of one row.

    Ray Data looks ten times a second what its tasks have made, and lets each make two blocks until then: 20 rows a second would be
    all that any number of actors gets. Here a task makes `rows_ahead`.
    """
    arguments = {_GENERATOR_BACKPRESSURE: 2 * rows_ahead}  # a block is two objects
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # of Ray 2.64, for this argument
        return ray.data.read_datasource(source, override_num_blocks=1, num_cpus=0, ray_remote_args=arguments)


class Endless(BackpressurePolicy):
    """Holds the source back when enough rows wait for an actor, and forgets blocks that are done.

    Ray Data itself holds a source back by the bytes of its blocks. A plan has next to none, and would be read for as long as actors
    are slower than it, at the cost of most of a core and of memory.
    """

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """0 = none for now, None = no limit (of this policy). Asked in every step of Ray Data's loop, by the thread of that loop."""
        if isinstance(op, MapOperator):
            forget(op)
        if not isinstance(op, TaskPoolMapOperator):
            return None
        (actors,) = op.output_dependencies
        waiting = self._topology[actors].total_enqueued_input_blocks()
        return 0 if waiting >= self._data_context.get_config(_ROWS_AHEAD) else None


def forget(op: MapOperator) -> None:
    """Drops what Ray Data keeps of blocks that have left an operator (statistics, places in the order), some kB of each.

    It is for a summary at the end, which a training run does not have.
    """
    op._output_blocks_stats.clear()
    queue = op._output_queue
    if isinstance(queue, ReorderingBundleQueue):
        for key in [key for key in queue._inner if key < queue._current_key]:
            del queue._inner[key]
        queue._finalized_keys = {key for key in queue._finalized_keys if key >= queue._current_key}
