"""Saving and resuming a run: sharded tensors (torch.distributed.checkpoint) and a few numbers, through Ray Train.

Every rank writes its shards into a folder of its own; Ray Train copies them together into `<storage>/<name>/step_000123` and keeps the
latest ones. A run of the same name and storage begins at the latest complete one, on any number of workers. Random numbers need no
saving: those of a step are a function of (seed, step, rank).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint, CheckpointUploadMode
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from molmo_core.models.base import ModelBase
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import rank, world_size

STATE_NAME = "state.json"
MODEL_FOLDER = "model"


def save(model: ModelBase, optimizer: Optimizer, state: dict[str, Any], final: bool = False, wait: bool = False) -> None:
    """Saves a checkpoint of step `state["step"]`; every rank calls it.

    Args:
        model, optimizer: what is saved.
        state: numbers to go on with (see `loop`), JSON.
        final: add the self-contained folder `model` (safetensors, configuration, tokenizer).
        wait: return when the checkpoint is in the storage, else copying goes on in the background.
    """
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_"))
    weights, moments = get_state_dict(model, optimizer.optimizers)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=folder)
    if final:
        model.save_checkpoint(folder / MODEL_FOLDER)
    if rank() == 0:
        (folder / STATE_NAME).write_text(json.dumps(state))
    ray.train.report(
        {"step": state["step"]},
        checkpoint=Checkpoint.from_directory(str(folder)),
        checkpoint_dir_name=f"step_{state['step']:06d}",
        checkpoint_upload_mode=CheckpointUploadMode.SYNC if final or wait else CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def resume(model: ModelBase, optimizer: Optimizer) -> dict[str, Any] | None:
    """Loads the latest checkpoint of this run into model and optimiser; returns its `state`, None if there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        weights, moments = get_state_dict(model, optimizer.optimizers)
        tensors = {"model": weights, "optim": moments}
        dcp.load(tensors, checkpoint_id=folder)
        set_state_dict(model, optimizer.optimizers, model_state_dict=weights, optim_state_dict=moments)
        state = json.loads((Path(folder) / STATE_NAME).read_text())
        if world_size() > 1:
            dist.barrier()  # the folder may be a download that the first rank to leave would delete
    return state


def merged(state: dict[Any, Any]) -> dict[str, Any]:
    """The loader states of all ranks as one."""
    states: list[Any] = [state]
    if world_size() > 1:
        states = [None] * world_size()
        dist.all_gather_object(states, state)
    return {str(key): value for part in states for key, value in part.items()}
