"""The project's own checkpoints: a folder with config.yaml, safetensors and tokenizer/, complete in itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from molmo_core.checkpoint.checksums import write_checksums
from molmo_core.checkpoint.folder import CONFIG_NAME, CheckpointError
from molmo_core.checkpoint.links import Model, export_specs, exporter, model_tensors, same_names
from molmo_core.checkpoint.safetensors_stream import write_safetensors

TOKENIZER_NAME = "tokenizer"
SHARD_BYTES = 5 * 10**9


def save_checkpoint(model: Model, path: str | Path, sharded: bool = False, dtype: torch.dtype | None = None) -> None:
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
            write_checksums(folder)
    if dist.is_initialized():
        dist.barrier()


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
