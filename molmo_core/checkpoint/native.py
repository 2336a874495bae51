"""The project's own checkpoints: a folder with config.yaml, safetensors and tokenizer/, complete in itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from molmo_core.checkpoint.layouts import published_links
from molmo_core.checkpoint.links import Link, LoadReport, export_specs, exporter, load_tensors, model_tensors, same_names
from molmo_core.checkpoint.published_config import is_published, published_layout
from molmo_core.checkpoint.safetensors_stream import CheckpointError, SafetensorsReader, model_dtype, write_safetensors

if TYPE_CHECKING:
    from molmo_core.models.base import ModelBase

CONFIG_NAME = "config.yaml"
TOKENIZER_NAME = "tokenizer"
SHARD_BYTES = 5 * 10**9


def save_checkpoint(model: ModelBase, path: str | Path, sharded: bool = False, dtype: torch.dtype | None = None) -> None:
    """Writes a self-contained folder. It appears under its name only when complete; an older checkpoint there is replaced.

    Every rank calls this where the model is sharded (FSDP2): tensors are gathered one at a time and rank 0 writes.

    Args:
        model: any of the models.
        path: the folder.
        sharded: numbered files of at most 5 GB and an index instead of one file.
        dtype: floating-point type to store (None: as in the model).

    Raises:
        CheckpointError: `path` exists and is something else than a checkpoint.
        FileNotFoundError: the tokenizer of the configuration cannot be found.
    """
    path = Path(path)
    tokenizer = model.tokenizer  # on every rank, so that a missing one fails on every rank
    if path.exists() and not (path / CONFIG_NAME).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not a checkpoint; it is not overwritten")
    tensors = model_tensors(model)
    links = same_names(tensors)
    specs, tensor = export_specs(tensors, links, dtype), exporter(tensors, links)
    limit = SHARD_BYTES if sharded else None
    if dist.is_initialized() and dist.get_rank() != 0:
        write_safetensors(path, specs, tensor, limit, write=False)
    else:
        with atomic_folder(path) as folder:
            write_safetensors(folder, specs, tensor, limit)
            tokenizer.save(folder / TOKENIZER_NAME)
            _portable(model.config).save(folder / CONFIG_NAME)
    if dist.is_initialized():
        dist.barrier()


def load_checkpoint(model: ModelBase, path: str | Path, strict: bool = True) -> LoadReport:
    """Reads weights into an existing model, which may be sharded (FSDP2), keeping its dtype and device.

    Args:
        model: a model of the same configuration.
        path: an own checkpoint, a published one (config.json), or a bare safetensors file with own names.
        strict: every tensor must be there and be used; False reports what was not.

    Raises:
        CheckpointError: naming every missing, unexpected and mis-shaped tensor; or the file is a pickle.
    """
    reader = SafetensorsReader(path)
    return load_tensors(model, reader, checkpoint_links(model, reader), strict)


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ModelBase:
    """Builds the model that an own checkpoint describes and loads it, in eval mode.

    The model is built without memory and filled tensor by tensor, so that the peak is little more than the model itself.

    Args:
        path: the checkpoint folder.
        dtype: floating-point type of the model (None: as stored).
        device: where it goes (None: CPU).
    """
    from molmo_core.models.base import BaseModelConfig  # the one place where this package looks up: models import it

    return build_and_load(BaseModelConfig.load(Path(path) / CONFIG_NAME), path, dtype, device)


def build_and_load(config: Any, path: str | Path, dtype: torch.dtype | None, device: torch.device | str | None) -> ModelBase:
    """A model of a configuration, filled from a checkpoint of any layout."""
    dtype, reader = model_dtype(dtype), SafetensorsReader(path)
    with torch.device("meta"):
        model = config.build_model()
    load_tensors(model, reader, checkpoint_links(model, reader), strict=True, dtype=dtype, device=device)
    return model.eval()


def checkpoint_links(model: ModelBase, reader: SafetensorsReader) -> list[Link]:
    """How the tensors of a checkpoint correspond to the model's."""
    names = model_tensors(model)
    if not is_published(reader.path):
        return same_names(names)
    return published_links(published_layout(reader.path, reader.specs), names, model.config.llm, reader.specs)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its name, and its place, when the block ends well; it vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        folder.chmod(0o755)
        yield folder
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(folder, path)
            shutil.rmtree(old)
        else:
            os.replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # nothing is there after success


def _portable(config: Any) -> Any:
    """The configuration with the folder's own tokenizer and without paths of this machine."""
    data = config.as_dict()
    data["llm"] |= {"tokenizer": {"identifier": TOKENIZER_NAME}, "init_path": None}
    if data.get("vision_backbone"):
        data["vision_backbone"]["vit"]["init_path"] = None
    return type(config).from_dict(data)
