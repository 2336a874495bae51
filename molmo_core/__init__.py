"""The Molmo family of vision-language models: models, preprocessing, generation, checkpoints.

Everything here is looked up at first use, so that data workers import this package without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molmo_core.checkpoint.loading import from_pretrained
    from molmo_core.config import ConfigError
    from molmo_core.model_configs.he_molmo import HeMolmoConfig
    from molmo_core.model_configs.molmo import MolmoConfig
    from molmo_core.model_configs.molmo2 import Molmo2Config
    from molmo_core.model_configs.molmo_point import MolmoPointConfig
    from molmo_core.model_configs.video_olmo import VideoOlmoConfig
    from molmo_core.models.he_molmo import HeMolmo
    from molmo_core.models.molmo import Molmo
    from molmo_core.models.molmo2 import Molmo2
    from molmo_core.models.molmo_point import MolmoPoint
    from molmo_core.models.video_olmo import VideoOlmo
    from molmo_core.registry import BaseModelConfig

__all__ = [
    "BaseModelConfig", "ConfigError", "HeMolmo", "HeMolmoConfig", "Molmo", "Molmo2", "Molmo2Config", "MolmoConfig", "MolmoPoint",
    "MolmoPointConfig", "VideoOlmo", "VideoOlmoConfig", "from_pretrained",
]  # fmt: skip

_HOME = {
    "from_pretrained": "checkpoint.loading", "ConfigError": "config", "BaseModelConfig": "registry",
    "Molmo": "models.molmo", "VideoOlmo": "models.video_olmo", "HeMolmo": "models.he_molmo", "Molmo2": "models.molmo2",
    "MolmoConfig": "model_configs.molmo", "VideoOlmoConfig": "model_configs.video_olmo", "HeMolmoConfig": "model_configs.he_molmo",
    "Molmo2Config": "model_configs.molmo2", "MolmoPoint": "models.molmo_point", "MolmoPointConfig": "model_configs.molmo_point",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"molmo_core.{_HOME[name]}"), name)
    raise AttributeError(f"module 'molmo_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
