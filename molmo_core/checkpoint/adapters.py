"""Adapters (LoRA) as a folder of their own, a hundredth of a model, and their way back onto the model that they were trained on.

The folder is PEFT's: `adapter_config.json` and `adapter_model.safetensors`, with this project's names of layers. Beside them
`base_checksums.json` says which model they belong to: the checksums of its safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from molmo_core.checkpoint.checksums import CHECKSUMS_NAME, Checksums, as_text, check_folder, checksum, from_text, write_checksums
from molmo_core.checkpoint.folder import ADAPTER_BASE, ADAPTER_CONFIG, CheckpointError, adapted_base, read_json
from molmo_core.checkpoint.links import clean_name
from molmo_core.checkpoint.native import atomic_folder
from molmo_core.checkpoint.safetensors_stream import SafetensorsReader
from molmo_core.nn.lora import LoraLinear

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's: how its wrappers name the model inside
_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def base_checksums(folder: Path) -> Checksums:
    """What a model is known by: the checksums of its safetensors files, from `checksums.json` where that is there, else read (at some
    4 GB a second)."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / CHECKSUMS_NAME).is_file():  # loading compares the files with it
        known = _sums(folder / CHECKSUMS_NAME)
        if all(file.name in known for file in files):
            return {file.name: known[file.name] for file in files}
    found = {}
    for file in files:
        with file.open("rb") as stream:
            found[file.name] = checksum(stream)
    return found


def save_adapters(model: nn.Module, path: str | Path, base: str | Path, sums: Checksums) -> None:
    """Writes the adapters of a model, merged or not, as a folder; it appears under its name only when complete.

    Every rank calls this where the model is sharded (FSDP2); rank 0 writes.

    Args:
        model: all of its adapters have one rank and one scale.
        path: the folder.
        base: where the model without its adapters is: a folder, or a hub repository.
        sums: what `base_checksums` says of it.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = {clean_name(name): layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    if not layers:
        raise ValueError("the model has no adapters")
    tensors = {}
    for name, layer in layers.items():
        for ours, theirs in _NAMES.items():
            tensor = getattr(layer, ours).detach()
            tensors[f"{_PREFIX}{name}.{theirs}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()
    if not dist.is_initialized() or dist.get_rank() == 0:
        one = next(iter(layers.values()))
        with atomic_folder(Path(path)) as folder:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / ADAPTER_BASE).write_text(as_text(sums), encoding="utf-8")
            write_checksums(folder)
            # No checksum: whoever moves the base writes its new place here.
            settings = {"base_model_name_or_path": str(base), "r": one.lora_a.shape[0], "lora_alpha": one.scale * one.lora_a.shape[0]}
            settings |= {"peft_type": "LORA", "target_modules": list(layers), "bias": "none", "lora_dropout": 0.0, "inference_mode": True}
            (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()


class Adapters:
    """The adapters of a folder."""

    def __init__(self, folder: Path):
        """Opens what `save_adapters` wrote.

        Raises:
            CheckpointError: a file is missing, damaged or not what that writes; the base is not there, or another model than that which
                the adapters were trained on.
        """
        base = adapted_base(folder)
        if base is None:
            raise CheckpointError(f"{folder}: no adapters of this project ({ADAPTER_CONFIG} and {ADAPTER_BASE})")
        self.folder, self.base = folder, base
        check_folder(folder)
        self._check_base()
        self._reader = SafetensorsReader(folder / WEIGHTS)
        config = read_json(folder / ADAPTER_CONFIG)
        try:
            self.scale = float(config["lora_alpha"]) / int(config["r"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG}: r and lora_alpha must be numbers ({error!r})") from None
        suffix = f".{_NAMES['lora_a']}"
        self.layers = [name.removeprefix(_PREFIX).removesuffix(suffix) for name in self._reader.specs if name.endswith(suffix)]
        """Names of the layers that have adapters."""
        expected = {f"{_PREFIX}{layer}.{name}" for layer in self.layers for name in _NAMES.values()}
        if wrong := sorted(set(self._reader.specs) ^ expected):
            raise CheckpointError(f"{folder / WEIGHTS}: not pairs of lora_A and lora_B: {', '.join(wrong[:5])}")

    def change(self, layer: str) -> torch.Tensor:
        """scale · B·A, what the weight of a layer becomes more: float32 [out, in]."""
        a, b = (self._reader.read(f"{_PREFIX}{layer}.{name}").float() for name in _NAMES.values())
        return self.scale * (b @ a)

    def merge_into(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Adds the adapters to a base's tensors (`links.model_tensors`), in place. Of a sharded model (FSDP2) all ranks call it.

        Raises:
            CheckpointError: a layer is not there, or of another shape. Nothing has been changed then.
        """
        targets = {layer: tensors.get(f"{layer}.weight") for layer in self.layers}
        for layer, weight in targets.items():
            a, b = (self._reader.specs[f"{_PREFIX}{layer}.{name}"].shape for name in _NAMES.values())
            if weight is None or tuple(weight.shape) != (b[0], a[1]):
                there = "none" if weight is None else list(weight.shape)
                raise CheckpointError(f"{self.folder}: {layer} is adapted as [{b[0]}, {a[1]}], the model has {there}")
        for layer, weight in targets.items():
            assert weight is not None
            weight, change = weight.detach(), self.change(layer).to(weight.device)
            if isinstance(weight, DTensor):
                part: Any = distribute_tensor(change, weight.device_mesh, weight.placements, src_data_rank=None)
                weight, change = weight.to_local(), part.to_local()
            weight += change.to(weight.dtype)

    def _check_base(self) -> None:
        expected, found = _sums(self.folder / ADAPTER_BASE), base_checksums(self.base)
        if expected == found:
            return
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{self.folder}: these adapters were trained on another model than the one in {self.base} (its checksums differ: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). Give the folder of theirs as base_model_name_or_path in "
            f"{ADAPTER_CONFIG} there"
        )


def _sums(file: Path) -> Checksums:
    try:
        return from_text(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
