"""Every number of every configuration has limits, and one outside is named when the configuration is loaded."""

import dataclasses
import importlib
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from molmo_core.config import BaseConfig, ConfigError, limits_of
from molmo_core.registry import MODELS, config_class
from pipelines.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
for _path in sorted(path for package in ("molmo_core", "pipelines") for path in (ROOT / package).rglob("*.py")):
    if "(BaseConfig)" in _path.read_text():
        importlib.import_module(".".join(_path.relative_to(ROOT).with_suffix("").parts))


def subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


for _name in MODELS:
    config_class(_name)
CLASSES = sorted(
    {cls for cls in subclasses(BaseConfig) if cls.__module__.startswith(("molmo_core.", "pipelines."))}, key=lambda cls: str(cls)
)
NUMBERS = [
    (cls, field.name, hint)
    for cls in CLASSES
    for field in dataclasses.fields(cls)
    if limits_of(hint := typing.get_type_hints(cls, include_extras=True)[field.name])
]
IDS = [f"{cls.__qualname__}.{name}" for cls, name, _ in NUMBERS]


def required(cls: type) -> dict[str, Any]:
    """What has to be given."""
    given = {"TrainConfig": {"name": "n", "model": {}, "data": {"datasets": {"a": {"path": "p"}}}, "steps": 1}}
    data = {"datasets": {"a": {"path": "p"}}}
    given |= {"DataConfig": data, "ValidationConfig": {"data": data}, "SamplesConfig": {"records": "r"}, "ServeConfig": {"model": "m"}}
    given["LlmConfig"] = {"block_type": "moe"}
    given["EvaluateConfig"] = {"model": "m", "records": "r", "output": "o"}
    given["RegisterConfig"] = {"checkpoint": "c", "name": "n"}
    stages = ("prepare", "train", "evaluate")
    texts = dict.fromkeys(("dataset", "folder", *stages, "register", "serve"), "x")
    given["DemoConfig"] = texts | {"told": dict.fromkeys(stages, "x"), "asked": ["x"]}
    return given.get(cls.__name__, {})


def test_there_are_numbers():
    assert len(NUMBERS) > 150
    assert TrainConfig in CLASSES


@pytest.mark.parametrize(("cls", "name", "hint"), NUMBERS, ids=IDS)
def test_numbers_have_limits(cls, name, hint):
    for kind, limits in limits_of(hint):
        assert limits.keys() & {"ge", "gt"}, f"{cls.__qualname__}.{name}: {kind.__name__} without a least value"
        assert limits.keys() & {"le", "lt"}, f"{cls.__qualname__}.{name}: {kind.__name__} without a largest value"


def outside(hint: Any) -> Iterator[Any]:
    """Values that no number of this type may have, in its shape."""
    limits = limits_of(hint)[0][1]
    values = [math.nan, math.inf, -math.inf, 10**30, -(10**30)]
    values += [limits[bound] + step for bound, step in (("ge", -1), ("le", 1)) if bound in limits]
    values += [limits[bound] for bound in ("gt", "lt") if bound in limits]
    values += [0] if limits.get("ge", 0) >= 1 else []
    shape = next((typing.get_origin(part) for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) in (list, tuple)), None)
    for value in values:
        yield value if shape is None else [value, value]


@pytest.mark.parametrize(("cls", "name", "hint"), NUMBERS, ids=IDS)
def test_numbers_outside_are_named(cls, name, hint, tmp_path):
    path = tmp_path / "some.yaml"
    for value in outside(hint):
        OmegaConf.save({**required(cls), name: value}, path)
        # `cls.from_dict`, as `load` of some classes reads further files.
        with pytest.raises(ConfigError, match=rf"some\.yaml: \d invalid value\(s\)\n(.*\n)*?  (mm_preprocessor\.)?{re.escape(name)}\b"):
            cls.from_dict(OmegaConf.to_container(OmegaConf.load(path)), source="some.yaml")
