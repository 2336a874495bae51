"""Every file in configs/ loads with its class, so that no recipe rots."""

from pathlib import Path

import pytest

from molmo_core.config import BaseConfig, ConfigError
from molmo_core.models.base import BaseModelConfig
from pipelines.data.config import PrepareConfig
from pipelines.demo_config import DemoConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.registry.config import PromoteConfig, RegisterConfig
from pipelines.serving.config import ServeConfig
from pipelines.training.config import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
CLASSES: dict[str, type[BaseConfig]] = {
    "models": BaseModelConfig,
    "data": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
    "promote": PromoteConfig,
    "serve": ServeConfig,
    "demo": DemoConfig,
}
CHECKPOINT = Path(__file__).parent / "golden/molmo-qwen2-clip"
OWN = ("demo", "emoji_scenes", "emoji_scenes_small", "own")
"""Evaluations that name their model, or whose records are the user's."""
# What a recipe leaves to the one who uses it.
GIVEN = {
    "train/finetune.yaml": [f"init_from={CHECKPOINT}"],
    "train/he-molmo-captioner.yaml": ["steps=1"],
    "train/he-molmo-qa.yaml": ["init_from=c", f"model.base={CONFIGS / 'models/he-molmo.yaml'}"],
    "train/molmo2-long.yaml": ["init_from=c", f"model.base={CONFIGS / 'models/molmo2-8b.yaml'}"],
    "train/molmo2-sft.yaml": ["init_from=c", "steps=1", f"model.base={CONFIGS / 'models/molmo2-8b.yaml'}"],
    "train/molmo-captioner.yaml": ["steps=1"],
    "train/molmo-sft.yaml": [f"init_from={CHECKPOINT}"],
    **{
        f"train/molmo-point-{name}.yaml": ["init_from=c", f"model.base={CONFIGS / 'models/molmo-point-8b.yaml'}"]
        for name in ("sft", "long", "gui")
    },
    "evaluate/own.yaml": ["model=m", "records=r.jsonl"],
    **{f"evaluate/{path.name}": ["model=m"] for path in (CONFIGS / "evaluate").glob("*.yaml") if path.stem not in OWN},
    "register/own.yaml": ["checkpoint=c", "name=n"],
    "serve/own.yaml": ["model=m"],
}
FILES = sorted(CONFIGS.rglob("*.yaml"))


def test_groups():
    assert {path.parent.name for path in FILES} == set(CLASSES), "each group has its class here and its files there"
    assert sorted(CONFIGS.rglob("*.y*ml")) == FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_loads(path, tmp_path):
    given = GIVEN.get(path.relative_to(CONFIGS).as_posix(), [])
    config = CLASSES[path.parent.name].load(path, given)
    assert path.read_text().startswith("#"), "a recipe begins with a comment that says what it is for"
    again = tmp_path / path.name
    config.save(again)
    assert CLASSES[path.parent.name].load(again).as_dict() == config.as_dict()


@pytest.mark.parametrize("name", GIVEN)
def test_what_has_to_be_given_is_named(name):
    key = GIVEN[name][0].partition("=")[0]
    with pytest.raises(ConfigError, match=rf"\b{key}\b"):
        CLASSES[name.partition("/")[0]].load(CONFIGS / name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_unknown_key(path):
    with pytest.raises(ConfigError, match="no_such_setting"):
        CLASSES[path.parent.name].load(path, [*GIVEN.get(path.relative_to(CONFIGS).as_posix(), []), "no_such_setting=1"])
