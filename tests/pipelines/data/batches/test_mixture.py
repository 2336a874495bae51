"""Mixture rates as in the published recipes."""

import math

import pytest

from molmo_core.config import ConfigError
from pipelines.data.batches.mixture import rates
from pipelines.data.config import DataConfig


def groups(**kinds):
    return DataConfig.from_dict({"groups": kinds}).all_groups()


def test_square_root_of_size_within_fixed_groups():
    found = rates(
        groups(a={"weight": 3, "datasets": {"x": {}, "y": {}}}, b={"weight": 1, "datasets": {"z": {}}}), {"x": 100, "y": 400, "z": 7}
    )
    assert found == pytest.approx({"x": 0.75 / 3, "y": 0.75 * 2 / 3, "z": 0.25})


def test_caps_shares_and_factors():
    config = {
        "cap": {"sampling_size": 100},
        "share": {"sampling_size": 0.25},
        "times": {"sampling_rate": 1.5},
        "small": {"sampling_size": 100},
    }
    found = rates(groups(all={"datasets": config}), {"cap": 10_000, "share": 400, "times": 100, "small": 16})
    roots = {"cap": 10, "share": 10, "times": 15, "small": 10}
    assert found == pytest.approx({k: v / 45 for k, v in roots.items()})
    assert math.isclose(sum(found.values()), 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"a": {"datasets": {}}}, "at least one dataset"),
        ({"a": {"weight": 0, "datasets": {"x": {}}}}, "positive weight"),
        ({"a": {"datasets": {"x": {}}}, "b": {"datasets": {"x": {}}}}, "another group"),
        ({"a": {"datasets": {"x": {"sampling_rate": 0}}}}, "not positive"),
        ({"a": {"datasets": {"x": {"sampling_rate": -1}}}}, "must be at least 0"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        rates(groups(**config), {"x": 3})


def test_datasets_or_groups():
    with pytest.raises(ConfigError, match="either datasets"):
        DataConfig.from_dict({})
    with pytest.raises(ConfigError, match="either datasets"):
        DataConfig.from_dict({"datasets": {"x": {}}, "groups": {"a": {"datasets": {"y": {}}}}})
