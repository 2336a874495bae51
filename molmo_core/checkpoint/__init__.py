"""Checkpoints: own and published layouts, in and out. Looked up at first use: what only reads configurations needs no torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molmo_core.checkpoint.folder import CheckpointError
    from molmo_core.checkpoint.loading import from_pretrained, load_checkpoint, load_model
    from molmo_core.checkpoint.native import save_checkpoint

__all__ = ["CheckpointError", "from_pretrained", "load_checkpoint", "load_model", "save_checkpoint"]

_HOME = {"CheckpointError": "folder", "from_pretrained": "loading", "load_checkpoint": "loading", "load_model": "loading",
         "save_checkpoint": "native"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"molmo_core.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'molmo_core.checkpoint' has no attribute {name!r}")
