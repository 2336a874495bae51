"""Checkpoints: own and published layouts, in and out."""

from molmo_core.checkpoint.huggingface import from_pretrained
from molmo_core.checkpoint.native import load_checkpoint, load_model, save_checkpoint
from molmo_core.checkpoint.safetensors_stream import CheckpointError

__all__ = ["CheckpointError", "from_pretrained", "load_checkpoint", "load_model", "save_checkpoint"]
