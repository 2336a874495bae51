"""What is known of Ray Data's inside is checked against the Ray that is there; another one is used plainly, with one warning."""

from __future__ import annotations

import sys
import warnings

import pytest
import ray
from ray.data._internal.execution.bundle_queue.reordering import ReorderingBundleQueue
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data._internal.execution.streaming_executor_state import OpState

from pipelines.data.batches import endless, ray_internals


@pytest.fixture(autouse=True)
def ask_again():
    endless.internals.cache_clear()
    yield
    endless.internals.cache_clear()


def test_the_installed_ray_is_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert endless.internals() is ray_internals


class Without:
    """An operator or a queue whose constructor sets nothing."""

    def __init__(self):
        pass


def another_version(patch):
    patch.setattr(ray, "__version__", "2.61.0")


def no_method(patch):
    patch.delattr(OpState, "total_enqueued_input_blocks")


def other_operator(patch):
    patch.setitem(ray_internals._TOUCHED, Without, ray_internals._TOUCHED[MapOperator])


def other_queue(patch):
    patch.setattr(ReorderingBundleQueue, "__init__", Without.__init__)


def no_option(patch):
    patch.delitem(ray_internals.task_options, "_generator_backpressure_num_objects")


def no_module(patch):
    patch.setitem(sys.modules, "ray.data._internal.execution.bundle_queue.reordering", None)
    patch.delitem(sys.modules, "pipelines.data.batches.ray_internals")
    patch.delattr("pipelines.data.batches.ray_internals")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (another_version, r"version 2\.61\.0, 2\.60\.\* is known"),
        (no_method, "no OpState.total_enqueued_input_blocks"),
        (other_operator, "no Without._output_blocks_stats, Without._output_queue"),
        (other_queue, "no ReorderingBundleQueue._inner, .*_current_key, .*_finalized_keys"),
        (no_option, "no _generator_backpressure_num_objects"),
        (no_module, "reordering"),
    ],
)
def test_another_one_is_used_plainly_with_one_warning(monkeypatch, change, told):
    change(monkeypatch)
    with pytest.warns(UserWarning, match=f"plain Ray Data, which is slower.*{told}"):
        assert endless.internals() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert endless.internals() is None
