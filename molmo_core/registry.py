"""The models by name, the base of their configurations, and the answer to "which model is this path". Imported without torch."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, NamedTuple, Self

from molmo_core.checkpoint.folder import Published, locate
from molmo_core.checkpoint.published_config import read_published_config
from molmo_core.config import BaseConfig, ConfigError, nearest, overridden, read_yaml


class Entry(NamedTuple):
    """Where a model's classes are, as `module:name`."""

    config: str
    model: str


MODELS: dict[str, Entry] = {
    "molmo": Entry("molmo_core.model_configs.molmo:MolmoConfig", "molmo_core.models.molmo:Molmo"),
    "video_olmo": Entry("molmo_core.model_configs.video_olmo:VideoOlmoConfig", "molmo_core.models.video_olmo:VideoOlmo"),
    "he_molmo": Entry("molmo_core.model_configs.he_molmo:HeMolmoConfig", "molmo_core.models.he_molmo:HeMolmo"),
    "molmo_point": Entry("molmo_core.model_configs.molmo_point:MolmoPointConfig", "molmo_core.models.molmo_point:MolmoPoint"),
    "molmo2": Entry("molmo_core.model_configs.molmo2:Molmo2Config", "molmo_core.models.molmo2:Molmo2"),
}
"""`model_name` of a configuration -> its classes. They are named, not imported: a configuration is read without torch."""


@dataclasses.dataclass
class BaseModelConfig(BaseConfig):
    """Base of the models' configurations. `model_name` in a file chooses the class."""

    model_name: str = ""

    @classmethod
    def load(cls, path: str | Path | Published, overrides: list[str] | None = None, key: str | None = None) -> Self:
        """The configuration of the model that a path is, of the class that its `model_name` names.

        Args:
            path: a YAML file, a checkpoint folder (own or published), a hub repository such as `allenai/Molmo-7B-D-0924`, or what
                `locate` found there.
            overrides: dotted assignments relative to the model, e.g. `["llm.n_layers=16"]`.
            key: where the model is in a YAML file. By default the whole file, or its part `model` if it is a training configuration.

        Raises:
            ConfigError: as `BaseConfig.load`; there is no model at `path`, or another one than the class asked for.
        """
        found = path if isinstance(path, Published) else locate(path, weights=False)
        if isinstance(found, Published):
            data, source, base = overridden(read_published_config(found), overrides), found.source, None
        else:
            data, source, base = read_yaml(found, overrides, key, part=None if key else "model"), found, found.parent
        name = data.get("model_name") or cls.model_name
        chosen = config_class(name, str(source))
        if not issubclass(chosen, cls):
            raise ConfigError(f"{source}: model_name={name!r} is a {chosen.__name__}, not a {cls.__name__}; load it with that class")
        return chosen.from_dict(data, source=str(source), base=base)

    @property
    def model_class(self) -> type[Any]:
        """The module class that this configuration describes (a `molmo_core.models.base.ModelBase`)."""
        return _imported(MODELS[self.model_name].model)

    def build_model(self) -> Any:
        """A new model with random weights (under `torch.device("meta")`: without memory)."""
        return self.model_class(self)


def config_class(model_name: str, source: str = "configuration") -> type[BaseModelConfig]:
    """The configuration class of a `model_name`.

    Raises:
        ConfigError: no such model.
    """
    if model_name not in MODELS:
        raise ConfigError(f"{source}: unknown model_name {model_name!r}.{nearest(model_name, MODELS)}")
    return _imported(MODELS[model_name].config)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
