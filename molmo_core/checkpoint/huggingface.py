"""Loading published checkpoints: from a folder or from the hub, without remote code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from molmo_core.checkpoint.native import CONFIG_NAME, build_and_load, load_model
from molmo_core.checkpoint.published_config import is_published, read_published_config
from molmo_core.checkpoint.safetensors_stream import PICKLE_SUFFIXES, CheckpointError, model_dtype, pickle_refusal

if TYPE_CHECKING:
    from molmo_core.models.base import ModelBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.yaml", "tokenizer/*"]


def from_pretrained(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> ModelBase:
    """A model with its weights, in eval mode; its tokenizer and preprocessing settings come with it (`model.config`).

    Reads own checkpoints and the published layouts of Molmo, MolmoE and Molmo2 (as released, and as transformers saves
    them), sharded or not. Tensors are read one at a time: the peak of memory is the model and one buffer.

    Args:
        path: a folder, or a hub repository such as `allenai/Molmo-7B-D-0924` (its local cache is used when there).
        dtype: floating-point type, e.g. `torch.bfloat16` or `"bfloat16"` (None: as stored).
        device: where the model goes (None: CPU).
        trust_remote_code: accepted because existing calls pass it; no code of a checkpoint is ever run.

    Raises:
        CheckpointError: no such checkpoint, an unknown layout, pickled weights, or tensors that do not fit.
        ValueError: no floating-point type.
    """
    dtype = model_dtype(dtype)
    folder = local_folder(path)
    if folder.suffix in PICKLE_SUFFIXES and folder.is_file():
        raise CheckpointError(pickle_refusal(folder))
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder with configuration, weights and tokenizer")
    if (folder / CONFIG_NAME).is_file():
        return load_model(folder, dtype, device)
    if not is_published(folder):
        raise CheckpointError(
            f"{folder}: neither {CONFIG_NAME} (own checkpoints) nor config.json (published ones) there; give the folder that holds one"
        )
    from molmo_core.models.base import config_class  # as in native.load_model

    data = read_published_config(folder)
    config = config_class(data["model_name"], str(folder)).from_dict(data, source=str(folder / "config.json"))
    return build_and_load(config, folder, dtype, device)


def local_folder(path: str | Path) -> Path:
    """A folder as it is; a hub repository after its download (or from the local cache).

    Raises:
        CheckpointError: neither exists.
    """
    folder = Path(path)
    return folder if folder.exists() else _download(str(path))


def _download(name: str) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such file or folder (and not the name of a hub repository, owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name}: no such folder here, and it cannot be downloaded from the hub ({error}). "
            "Offline, give the path of a folder with config.json, *.safetensors and tokenizer.json"
        ) from error
