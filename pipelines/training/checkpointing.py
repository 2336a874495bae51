"""Saving and resuming a run: sharded tensors (torch.distributed.checkpoint) and a few numbers, straight into the run's storage.

Every rank writes its shards and sums them up; when all have, the first one adds `state.json` and `checksums.json` and the folder appears
as `step_000123`. A run of the same name and storage resumes from the newest one whose files are as they were written, on any number of
workers. Which checkpoints there are is read from the storage alone: Ray Train is told of them, but not asked.
Random numbers need no saving: those of a step are a function of (seed, step, rank).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed.checkpoint as dcp
from ray.train import CheckpointUploadMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from molmo_core.checkpoint.checksums import CHECKSUMS_NAME, checksums, damage, read_checksums, write_checksums
from molmo_core.config import ConfigError
from molmo_core.models.base import ModelBase
from pipelines.training.errors import TrainingError
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import first, gathered, rank, world_size
from pipelines.training.storage import Storage, step_name

STATE_NAME = "state.json"
MODEL_FOLDER = "model"
LATEST_NAME = "latest"
"""File with the name of the newest checkpoint: whether it has gone is seen by it."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


class Checkpointer:
    """Checkpoints of one run. Every rank calls every method, in the same order."""

    def __init__(self, model: ModelBase, optimizer: Optimizer, storage: Storage, keep: int | None = None):
        """`keep`: how many of the newest checkpoints stay (None: all)."""
        self.model, self.optimizer, self.storage, self.keep = model, optimizer, storage, keep

    def save(self, state: dict[str, Any]) -> None:
        """Saves model, optimiser and `state` (JSON; `step` names the checkpoint); returns when they are in the storage.

        Raises:
            TrainingError: they cannot be written. Earlier checkpoints are as they were.
        """
        name = step_name(state["step"])
        try:
            with self.storage.scratch(name, rank()) as folder:
                weights, moments = get_state_dict(self.model, self.optimizer.optimizers)
                dcp.save({"model": weights, "optim": moments}, checkpoint_id=folder)
                mine = [path.name for path in folder.glob(f"__{rank()}_*")]
                if rank() == 0:
                    (folder / STATE_NAME).write_text(json.dumps(state))
                    mine += [STATE_NAME, ".metadata"]
                found = checksums(folder, mine)
                self.storage.upload(folder, name)
                parts = gathered(found)
                if rank() == 0:
                    write_checksums(folder, {file: sums for part in parts for file, sums in part.items()})
                    self.storage.publish(folder, name, CHECKSUMS_NAME)
                    self.storage.write(LATEST_NAME, name)
                    self._prune(state["step"])
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._cannot_write(name, error) from error
        # The name is agreed on by all ranks, so that none is ahead of the first one.
        checkpoint = self.storage.checkpoint(name)
        mode = CheckpointUploadMode.NO_UPLOAD
        ray.train.report({"step": state["step"]}, checkpoint=checkpoint, checkpoint_dir_name=name, checkpoint_upload_mode=mode)

    def save_model(self, step: int) -> str:
        """Adds the self-contained folder `model` (safetensors, configuration, tokenizer) to a checkpoint, unless it is there.

        Returns:
            Its path, or URL.

        Raises:
            TrainingError: it cannot be written.
        """
        name = f"{step_name(step)}/{MODEL_FOLDER}"
        try:
            if not first(lambda: self.storage.exists(f"{name}/{CHECKSUMS_NAME}")):
                if self.storage.local is not None:
                    self.model.save_checkpoint(self.storage.local / name)
                else:
                    with self.storage.scratch(name, rank()) as folder:
                        self.model.save_checkpoint(folder)
                        if rank() == 0:
                            self.storage.upload(folder, name, last=CHECKSUMS_NAME)
        except (OSError, RuntimeError) as error:
            raise self._cannot_write(name, error) from error
        return f"{self.storage.url}/{name}"

    def resume(self, tell: Callable[[str], None]) -> dict[str, Any] | None:
        """Loads the newest checkpoint that is whole into model and optimiser.

        Args:
            tell: called with a line for each newer one that is not.

        Returns:
            Its `state`; None if the run has no checkpoint yet.

        Raises:
            ConfigError: there were checkpoints, and none is whole.
        """
        latest, steps = first(lambda: (self.storage.read(LATEST_NAME), self.storage.steps()))
        problems = []
        if latest is not None and latest not in map(step_name, steps):
            problems.append(f"{self.storage.url}/{latest}, the newest checkpoint, is gone")
            tell(problems[-1])
        for step in steps:
            name = step_name(step)
            with self.storage.checkpoint(name).as_directory() as folder:
                found = self._damage(Path(folder))
                if not found:
                    return self._load(Path(folder))
            problems.append(f"{self.storage.url}/{name} is damaged: {'; '.join(found)}")
            tell(problems[-1])
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise ConfigError(
                f"none of the run's checkpoints can be resumed from:\n{lines}\nTo begin anew, delete {self.storage.url} "
                "or give the run another name (name=...)."
            )
        return None

    def _damage(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint. The ranks share the reading."""
        try:
            expected = read_checksums(folder)
        except ValueError as error:
            expected, problem = None, str(error)
        else:
            problem = f"{CHECKSUMS_NAME}: missing"
        largest = sorted(expected or {}, key=lambda name: (-expected[name]["bytes"], name))  # type: ignore[index]
        share = {name: expected[name] for name in largest[rank() :: world_size()]} if expected else {}
        found = [problem] if not expected else damage(folder, share)
        return sorted({line for part in gathered(found) for line in part})

    def _load(self, folder: Path) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer.optimizers)
        dcp.load({"model": weights, "optim": moments}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer.optimizers, model_state_dict=weights, optim_state_dict=moments)
        state = json.loads((folder / STATE_NAME).read_text())
        gathered(None)  # the folder may be a download that the first rank to leave would delete
        return state

    def _prune(self, newest: int) -> None:
        """Deletes what is older than the last `keep`, and what is newer: it was damaged when the run resumed before it."""
        steps = self.storage.steps()
        kept = [step for step in steps if step <= newest][: self.keep]
        for step in set(steps) - set(kept):
            self.storage.delete(step_name(step))

    def _cannot_write(self, name: str, error: BaseException) -> Exception:
        """What to raise: a storage that takes nothing more ends the run; after anything else (a lost rank) Ray Train may try again."""
        reason = unwritable(error)
        if reason is None:
            return error if isinstance(error, Exception) else RuntimeError(f"{self.storage.url}/{name}: {error}")
        before = [step_name(step) for step in self.storage.steps()]
        kept = f"{before[0]} and what was saved before it are whole" if before else "nothing had been saved before"
        return TrainingError(
            f"{self.storage.url}/{name} cannot be written: {reason}. The run ends here; {kept}. "
            "The same command continues when that is mended."
        )


def unwritable(error: BaseException | None) -> str | None:
    """Why a storage takes no more files, if that is what an error says."""
    if isinstance(error, CheckpointException):
        return next((reason for failure, _ in error.failures.values() if (reason := unwritable(failure))), None)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return error.strerror
    if error is None:
        return None
    reason = unwritable(error.__cause__ or error.__context__)
    if reason is None and isinstance(error, RuntimeError) and "inline_container" in str(error):
        return os.strerror(errno.ENOSPC)  # how torch's writer ends after a write that failed; what failed it is lost between ranks
    return reason


def merged(state: dict[Any, Any]) -> dict[str, Any]:
    """The loader states of all ranks as one."""
    return {str(key): value for part in gathered(state) for key, value in part.items()}
