"""What can be served: numbers outside their limits are named when the configuration is loaded."""

import dataclasses
import math
import typing

import pytest

from molmo_core.config import ConfigError, limits_of
from pipelines.serving.config import ServeConfig

HINTS = typing.get_type_hints(ServeConfig, include_extras=True)
NUMBERS = {field.name: limits_of(HINTS[field.name])[0] for field in dataclasses.fields(ServeConfig) if limits_of(HINTS[field.name])}
WHOLE = [name for name, (kind, _) in NUMBERS.items() if kind is int]


def test_limits_are_allowed():
    for name, (_, limits) in NUMBERS.items():
        for value in limits.values():
            assert getattr(ServeConfig(model="m", **{name: value}), name) == value


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, -1e300, 10**30, math.inf, -math.inf, math.nan])
def test_numbers_outside(name, value):
    with pytest.raises(ConfigError, match=f"ServeConfig: {name}[=:]"):
        ServeConfig(model="m", **{name: value})


@pytest.mark.parametrize(
    "name", [name for name, (_, limits) in NUMBERS.items() if name in (*WHOLE, "timeout_s") and min(limits.values()) > 0]
)
def test_zero(name, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(f"model: m\n{name}: 0\n")
    with pytest.raises(ConfigError, match=rf"{name}=0(\.0)? must be at least"):
        ServeConfig.load(path)


@pytest.mark.parametrize("value", [".nan", ".inf", "1e400", "many", "1.5"])
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_a_whole_number(name, value, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(f"model: m\n{name}: {value}\n")
    with pytest.raises(ConfigError, match=name):
        ServeConfig.load(path)


def test_float8_needs_half_precision_on_a_gpu():
    for settings in ({}, {"gpus_per_replica": 1, "dtype": "bfloat16"}, {"gpus_per_replica": 1, "dtype": "float16"}):
        assert ServeConfig(model="m", quantization="float8", **settings).quantization == "float8"
    with pytest.raises(ConfigError, match="dtype must be bfloat16 or float16"):
        ServeConfig(model="m", quantization="float8", gpus_per_replica=1)


def test_an_unknown_quantization_is_named(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("model: m\nquantization: float4\n")
    with pytest.raises(ConfigError, match="quantization"):
        ServeConfig.load(path)
