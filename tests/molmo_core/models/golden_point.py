"""The golden MolmoPoint: its weights under our names."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from molmo_core.model_configs.molmo_point import MolmoPointConfig
from molmo_core.models.molmo_point import MolmoPoint

_NAMES = (
    (r"^vit\.", "vision_backbone.image_vit."),
    (r"^connector\.positional_embeddings\.bias$", "vision_backbone.positional_embeddings"),
    (r"^connector\.", "vision_backbone."),
    (r"^(build_|vit_pos|loc_pos)", r"point_embedding.\1"),
    (r"^(patch_|subpatch_|x_norm|add_no)", r"point_predictor.\1"),
)


def name_here(name: str) -> str:
    """Of a parameter of the published training code."""
    for pattern, replacement in _NAMES:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


def load_config(folder: Path) -> MolmoPointConfig:
    """The published configuration; `debug` there asks for the first template of each kind."""
    return MolmoPointConfig.load(folder / "config.yaml", ["data_formatter.debug=false"])


def load_point_model(folder: Path, dtype: torch.dtype = torch.float32) -> MolmoPoint:
    """In eval mode, with the golden weights."""
    model = load_config(folder).build_model()
    model.load_state_dict({name_here(name): tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model.to(dtype).eval()


def cases(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """`CASE/NAME` as nested dictionaries."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        case, _, key = name.partition("/")
        result.setdefault(case, {})[key] = tensor
    return result


def inputs_here(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A golden batch under the names of our batches."""
    renamed = {"token_pooling": "pooled_patches_idx"}
    return {renamed.get(k, k): v for k, v in batch.items() if k != "image_pos_ids" and not k.startswith("vit_patch_mapping")}
