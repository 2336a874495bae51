"""What a path holds: a configuration file, an own checkpoint, a published one, or something that is not a model (and then, what)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from molmo_core.config import ConfigError, MissingFile

CONFIG_NAME = "config.yaml"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_BASE = "base_checksums.json"
"""Beside an adapter_config.json: the adapters are this project's (`checkpoint.adapters`)."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_YAML_SUFFIXES = (".yaml", ".yml")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SETTINGS = ["*.json", "*.jinja", "*.txt", "*.yaml", "tokenizer/*"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used. The message says what is wrong with which file or tensor, and what to do."""


class CheckpointMissing(CheckpointError, MissingFile):
    """There is nothing at a checkpoint's path."""


class Published(NamedTuple):
    """A checkpoint in a published (Hugging Face) layout, and its config.json as it was read."""

    folder: Path
    content: dict[str, Any]

    @property
    def source(self) -> Path:
        """The config.json, for errors."""
        return self.folder / "config.json"

    @property
    def model_type(self) -> Any:
        return self.content.get("model_type")

    @classmethod
    def read(cls, folder: str | Path) -> Published:
        """Reads the config.json of a folder.

        Raises:
            CheckpointError: not there, or not a JSON object.
        """
        return cls(Path(folder), read_json(Path(folder) / "config.json"))


def locate(path: str | Path, weights: bool = True) -> Path | Published:
    """Which model a path is. This is the one place that decides it.

    Args:
        path: a YAML file, a checkpoint folder (own or published), or a hub repository such as `allenai/Molmo-7B-D-0924`.
        weights: whether the weights are wanted, too: then a YAML file alone is refused, and those of a hub repository are downloaded.

    Returns:
        The YAML file of a configuration or of an own checkpoint, or the published checkpoint. Of a folder with adapters: their base.

    Raises:
        CheckpointError: there is no model there; the message says what there is and what to do.
    """
    path = local_folder(path, weights)
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(pickle_refusal(path))
        if path.suffix not in _YAML_SUFFIXES:
            raise CheckpointError(f"{path} is a file; a checkpoint is a folder with configuration, weights and tokenizer")
        if weights:
            raise CheckpointError(f"{path} is a file with a configuration; weights are in a checkpoint folder: give that")
        return path
    if (path / CONFIG_NAME).is_file():
        return path / CONFIG_NAME
    if (base := adapted_base(path, weights)) is not None:
        return locate(base, weights)
    if (path / ADAPTER_CONFIG).is_file():
        name = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"{path}: a PEFT adapter (LoRA) of {name or 'another model'}, not a model of its own. Merge it into that model first "
            "(peft: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)) and give the merged folder"
        )
    if (path / "config.json").is_file():
        return Published.read(path)
    raise CheckpointError(f"{path}: neither {CONFIG_NAME} (own checkpoints) nor config.json (published ones) there; {_advice(path)}")


def adapted_base(path: Path, weights: bool = True) -> Path | None:
    """Where the model is that the adapters in a folder were trained on; None if no adapters of this project are there.

    Raises:
        CheckpointError: it is not where they say.
    """
    if not (path / ADAPTER_BASE).is_file() or not (path / ADAPTER_CONFIG).is_file():
        return None
    base = str(read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path"))
    try:
        return local_folder(base, weights)
    except CheckpointMissing as error:
        raise CheckpointMissing(
            f"{path}: adapters of {base}, which is not there ({error}). Give its place as base_model_name_or_path in {ADAPTER_CONFIG}", base
        ) from None


def local_folder(path: str | Path, weights: bool = True) -> Path:
    """A path as it is; a hub repository after its download (or from the local cache).

    Raises:
        CheckpointError: neither exists.
    """
    folder = Path(path)
    return folder if folder.exists() else _download(str(path), weights)


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON file of a checkpoint ({} if it may be missing and is).

    Raises:
        CheckpointError: not there, or not a JSON object.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as a JSON object: {error}") from error


def pickle_refusal(path: Path) -> str:
    """Why a file is not loaded, and what to do about it."""
    return (
        f"{path}: weights in a pickle file are not loaded, because unpickling runs code that the file carries. "
        "Convert it once to safetensors where you trust it: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    )


def _advice(path: Path) -> str:
    """What to give in place of a folder that is not a model."""
    inside = sorted(p for p in path.glob("*/*") if p.name in (CONFIG_NAME, "config.json"))
    if inside:
        return f"give the folder that holds one: {' or '.join(str(folder) for folder in _some(p.parent for p in inside))}"
    there = _some(p.name for p in sorted(path.iterdir()))
    return f"give the folder that holds one (this one {'has ' + ', '.join(there) if there else 'is empty'})"


def _some(items: Iterable[Any], most: int = 5) -> list[Any]:
    """The first few, and dots for the rest."""
    unique = list(dict.fromkeys(items))
    return unique if len(unique) <= most else [*unique[:most], "..."]


def _download(name: str, weights: bool) -> Path:
    if Path(name).suffix in _YAML_SUFFIXES:
        raise CheckpointMissing(f"{name}: no such configuration file", name)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointMissing(f"{name}: no such file or folder (and not the name of a hub repository, owner/name)", name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=_SETTINGS + _WEIGHTS if weights else _SETTINGS))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CheckpointMissing(
            f"{name}: no such folder here, and it cannot be downloaded from the hub ({error}). "
            "Offline, give the path of a folder with config.json, *.safetensors and tokenizer.json",
            name,
        ) from error
