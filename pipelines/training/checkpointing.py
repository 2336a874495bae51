"""Saving and resuming a run: sharded tensors (torch.distributed.checkpoint) and a few numbers, straight into the run's storage.

`begin` copies what a rank holds (staging); from the copy a thread writes while training goes on. The ranks' threads agree among themselves,
in a process group of their own: when all shards are written, the first rank adds `checksums.json` and the folder appears as `step_000123`.
A run of the same name and storage resumes from the newest one whose files are as they were written, on any number of workers.
Which checkpoints there are is read from the storage alone: Ray Train knows nothing of them.
Random numbers need no saving: those of a step are a function of (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._state_dict_stager import StateDictStager  # torch 2.11's DefaultStager makes one copy and no second
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from molmo_core.checkpoint.adapters import base_checksums, save_adapters
from molmo_core.checkpoint.checksums import CHECKSUMS_NAME, Sum, as_text, damage, from_text
from molmo_core.checkpoint.folder import local_folder
from molmo_core.config import ConfigError
from molmo_core.models.base import ModelBase
from molmo_core.nn.lora import adapted_layers
from pipelines.training.config import CheckpointConfig
from pipelines.training.errors import TrainingError, passing, unwritable
from pipelines.training.events import Note, Saved
from pipelines.training.hooks import Hook
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import first, gathered, rank, together, world_size
from pipelines.training.shards import ShardReader, ShardWriter
from pipelines.training.storage import Storage, step_name

STATE_NAME = "state.json"
MODEL_FOLDER = "model"
ADAPTERS_FOLDER = "adapters"
LATEST_NAME = "latest"
"""File with the name of the newest checkpoint: whether it has gone is seen by it."""
WRITER_NAME = "writer"
"""File that names who resumed last: workers of a killed driver, or of a node that was cut off, may live on beside it, and save no more."""
RETRY_S = (1.0, 4.0, 16.0)
"""Waits before a save is tried again whose storage did not answer."""
MOST_FAILED = 3
"""Saves that may fail one after the other."""

logger = logging.getLogger(__name__)


class Checkpointer:
    """Checkpoints of one run. Every rank calls every method, in the same order."""

    def __init__(
        self, model: ModelBase, optimizer: Optimizer, storage: Storage, config: CheckpointConfig, tell: Callable[[Saved | Note], None]
    ):
        """`tell` hears of every checkpoint that is whole, of every save that failed, and of damaged ones."""
        self.model, self.optimizer, self.storage, self.config, self.tell = model, optimizer, storage, config, tell
        self.saved = 0
        """The step of the newest checkpoint."""
        self.failed = 0
        """How many of the last saves failed."""
        self._writer: str | None = None
        """What this one wrote into WRITER_NAME (known to the first rank)."""
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._stager: StateDictStager | None = None
        self._save: _Save | None = None

    def begin(self, state: dict[str, Any], hooks: Sequence[Hook] = ()) -> None:
        """Copies model, optimiser and what the hooks hold, and starts to write them and `state` (JSON; `step` names the checkpoint). One
        save at a time: an earlier one is waited for."""
        self.wait()
        began = time.perf_counter()
        weights, moments = get_state_dict(self.model, self.optimizer.optimizers, options=saved_parts(self.model))
        states = {_name(hook): hook.state() for hook in hooks}
        staged = self._staged({"model": weights, "optim": moments} | _tensors(hooks))
        self._save = _Save(state["step"], time.perf_counter() - began)
        self._save.start(lambda: self._write(staged, state | {"hooks": states}))

    def poll(self) -> bool:
        """Whether this rank has written all of a save that `wait` was not called for. The others may not have."""
        return self._save is not None and self._save.ended()

    def wait(self, last: bool = False) -> None:
        """Waits until what `begin` began is in the storage. A save that fails leaves nothing; earlier checkpoints are as they were.

        Args:
            last: no later save will make up for this one.

        Raises:
            TrainingError: it failed, and it is the `last` one or one of many.
        """
        save, self._save = self._save, None
        if save is None:
            return
        began = time.perf_counter()
        error = save.join()
        if error is None:
            self.saved, self.failed = save.step, 0
            self.tell(Saved(save.step, seconds=save.seconds, staging=save.staging, blocked=time.perf_counter() - began))
            return
        if isinstance(error, Superseded):
            raise error
        self.failed += 1
        problem = self._cannot_write(step_name(save.step), error)
        if last and unwritable(error) is None and not passing(error):
            raise error  # a lost rank, maybe: Ray Train may try again
        if last or self.failed >= MOST_FAILED:
            often = f" {self.failed} saves in a row failed." if self.failed > 1 else ""
            raise TrainingError(f"{problem}{often} The run ends here; the same command continues when that is mended.")
        self.tell(Note(f"{problem} Training continues; it ends if {MOST_FAILED} saves in a row fail."))

    def close(self) -> None:
        """Lets a save that is being written end, whatever it is that ends the run."""
        if self._save is not None:
            self._save.join()

    def save_model(self, step: int) -> str:
        """Adds the self-contained folder `model` (safetensors, configuration, tokenizer) to a checkpoint, unless it is there.

        Returns:
            Its path, or URL.

        Raises:
            TrainingError: it cannot be written.
        """

        def write(folder: Path) -> None:
            self.model.merge_adapters()
            self.model.save_checkpoint(folder)

        return self._add(f"{step_name(step)}/{MODEL_FOLDER}", write)

    def save_adapters(self, step: int, base: str) -> str:
        """Adds the folder `adapters` to a checkpoint of a model that has any, unless it is there; `base` is what they were trained on.

        Returns, Raises: as `save_model`.
        """

        def write(folder: Path) -> None:
            sums = together(lambda: base_checksums(local_folder(base)) if rank() == 0 else {})[0]
            save_adapters(self.model, folder, base, sums)

        return self._add(f"{step_name(step)}/{ADAPTERS_FOLDER}", write)

    def _add(self, name: str, write: Callable[[Path], None]) -> str:
        """A folder with checksums, which `write` writes on a disk, put into the storage; all ranks call it."""
        try:
            if not first(lambda: self.storage.exists(f"{name}/{CHECKSUMS_NAME}")):
                if self.storage.local is not None:
                    write(self.storage.local / name)
                else:
                    with tempfile.TemporaryDirectory(prefix="molmo-model-") as temporary:
                        folder = Path(temporary) / Path(name).name
                        write(folder)
                        if rank() == 0:
                            self.storage.upload(folder, name, last=CHECKSUMS_NAME)
        except (OSError, RuntimeError) as error:
            if unwritable(error) is None:
                raise
            raise TrainingError(f"{self._cannot_write(name, error)} The same command continues when that is mended.") from None
        return f"{self.storage.url}/{name}"

    def newest(self) -> str:
        """What there is to continue from, for errors. A save that is being written is waited for."""
        self.close()
        steps = self.storage.steps()
        return f"the last checkpoint is {step_name(steps[0])}" if steps else "there is no checkpoint yet"

    def resume(self, hooks: Sequence[Hook] = ()) -> dict[str, Any] | None:
        """Loads the newest checkpoint that is whole into model, optimiser and hooks; tells of each newer one that is not.

        Returns:
            Its `state`; None if the run has no checkpoint yet.

        Raises:
            ConfigError: there were checkpoints, and none is whole.
        """
        latest, steps = first(self._claim)
        problems = []
        if latest is not None and latest not in map(step_name, steps):
            problems.append(f"{self.storage.url}/{latest}, the newest checkpoint, is gone")
            self.tell(Note(problems[-1]))
        for step in steps:
            found = self.damage(step_name(step))
            if not found:
                self.saved = step
                return self._load(step_name(step), hooks)
            problems.append(f"{self.storage.url}/{step_name(step)} is damaged: {'; '.join(found)}")
            self.tell(Note(problems[-1]))
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise ConfigError(
                f"none of the run's checkpoints can be resumed from:\n{lines}\nTo begin anew, delete {self.storage.url} "
                "or give the run another name (name=...)."
            )
        return None

    def damage(self, name: str) -> list[str]:
        """What is wrong with a checkpoint. The ranks share the reading."""
        try:
            expected = from_text(self.storage.read(f"{name}/{CHECKSUMS_NAME}"))
        except ValueError as error:
            found = [str(error)]
        else:
            largest = sorted(expected, key=lambda file: (-expected[file]["bytes"], file))
            share = {file: expected[file] for file in largest[rank() :: world_size()]}
            found = damage(share, lambda file: self.storage.open(f"{name}/{file}"))
            found += [f"{CHECKSUMS_NAME}: names no files"] if not expected else []
        return sorted({line for part in gathered(found) for line in part})

    def _staged(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """A copy in this machine's memory, pinned if it comes from a GPU. The memory is used again by the next save."""
        gpu = self.model.device.type == "cuda"
        if self._stager is None:
            self._stager = StateDictStager(pin_memory=gpu)
        staged = self._stager.stage(tensors, non_blocking=gpu)
        if gpu:
            torch.cuda.synchronize(self.model.device)
        return staged

    def _write(self, staged: dict[str, Any], state: dict[str, Any]) -> None:
        """What the thread does. Raises on every rank if it fails on one; then nothing is left of it."""
        name = step_name(state["step"])
        for wait in (*RETRY_S, None):
            try:
                return self._write_once(name, staged, state)
            except Exception as error:
                if rank() == 0 and not isinstance(error, Superseded):
                    with contextlib.suppress(OSError):  # what the storage said first says more
                        self.storage.abandon(name)
                if wait is None or not passing(error):  # all ranks have the same error
                    raise
                time.sleep(wait)

    def _write_once(self, name: str, staged: dict[str, Any], state: dict[str, Any]) -> None:
        text = json.dumps(state)
        folder = together(lambda: self._begin(name) if rank() == 0 else "", self._group)[0]
        writer = ShardWriter(self.storage, folder)
        try:
            dcp.save(staged, storage_writer=writer, process_group=self._group, no_dist=world_size() == 1)
        except CheckpointException as error:  # the same one on all ranks
            raise cause(error) from None
        parts = together(lambda: writer.checksums, self._group)

        def publish() -> None:
            self.storage.write(f"{folder}/{STATE_NAME}", text)
            total = Sum()
            total.add(text.encode())
            found = {file: sums for part in parts for file, sums in part.items()} | {STATE_NAME: total.result()}
            self._check_writer()
            self.storage.publish(name, CHECKSUMS_NAME, as_text(found))
            self.storage.write(LATEST_NAME, name)

        together(lambda: publish() if rank() == 0 else None, self._group)
        if rank() == 0:
            self._prune(state["step"])

    def _claim(self) -> tuple[str | None, list[int]]:
        """Makes these workers the ones that may save; gives the name of the newest checkpoint, and the steps of those that are there."""
        self._writer = uuid.uuid4().hex
        try:
            self.storage.write(WRITER_NAME, self._writer)
        except OSError:  # a full disk: the first save will say so
            self._writer = self.storage.read(WRITER_NAME)
        return self.storage.read(LATEST_NAME), self.storage.steps()

    def _check_writer(self) -> None:
        if self.storage.read(WRITER_NAME) != self._writer:
            raise Superseded(f"{self.storage.url}: the run has been continued by other workers; these save no more")

    def _begin(self, name: str) -> str:
        self._check_writer()
        return self.storage.begin(name)

    def _load(self, name: str, hooks: Sequence[Hook]) -> dict[str, Any]:
        state = json.loads(self.storage.read(f"{name}/{STATE_NAME}") or "")
        saved = state.get("hooks", {})
        weights, moments = get_state_dict(self.model, self.optimizer.optimizers, options=saved_parts(self.model))
        tensors = {"model": weights, "optim": moments} | _tensors([hook for hook in hooks if _name(hook) in saved])
        dcp.load(tensors, storage_reader=ShardReader(self.storage, name), no_dist=world_size() == 1)
        set_state_dict(
            self.model, self.optimizer.optimizers, model_state_dict=weights, optim_state_dict=moments, options=saved_parts(self.model)
        )
        for hook in hooks:
            hook.load_state(saved.get(_name(hook), {}))
        return state

    def _prune(self, newest: int) -> None:
        """Deletes what is older than the last `keep` and no milestone, and what is newer: it was damaged when the run resumed before it."""
        steps = self.storage.steps()
        every = self.config.keep_every
        kept = set([step for step in steps if step <= newest][: self.config.keep])
        kept |= {step for step in steps if step <= newest and every and step % every == 0}
        for step in set(steps) - kept:
            try:
                self.storage.delete(step_name(step))
            except OSError as error:  # the next save tries again
                logger.warning("%s/%s could not be deleted: %s", self.storage.url, step_name(step), error)

    def _cannot_write(self, name: str, error: BaseException) -> str:
        before = [step_name(step) for step in self.storage.steps()]
        kept = f"{before[0]} and what was saved before it are whole" if before else "nothing had been saved before"
        return f"{self.storage.url}/{name} cannot be written: {unwritable(error) or error}; {kept}."


class Superseded(RuntimeError):
    """Others have continued the run: what these workers do has no use. No `TrainingError`, which would end the others, too."""


class _Save:
    """A checkpoint that a thread writes."""

    def __init__(self, step: int, staging: float):
        self.step, self.staging, self.seconds = step, staging, staging
        self._error: Exception | None = None

    def start(self, write: Callable[[], None]) -> None:
        began = time.perf_counter()

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._error = error
            self.seconds += time.perf_counter() - began

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> Exception | None:
        self._thread.join()
        return self._error


def saved_parts(model: ModelBase) -> StateDictOptions:
    """What of a model is in its checkpoints: all of it, or its adapters alone; the rest is what `init_from` names."""
    adapted = next(adapted_layers(model), None) is not None
    return StateDictOptions(ignore_frozen_params=adapted, strict=not adapted)


def _name(hook: Hook) -> str:
    return type(hook).__name__


def _tensors(hooks: Iterable[Hook]) -> dict[str, dict[str, torch.Tensor]]:
    """What hooks hold beside JSON, of those that hold any."""
    return {_name(hook): tensors for hook in hooks if (tensors := hook.tensors())}


def cause(error: CheckpointException) -> Exception:
    """Why ranks could not save: what their storage said, if it is that."""
    failures = [failure for failure, _ in error.failures.values()]
    known = next((failure for failure in failures if isinstance(failure, OSError)), None)
    return known or RuntimeError("; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()))


def merged(state: dict[Any, Any]) -> dict[str, Any]:
    """The loader states of all ranks as one."""
    return {str(key): value for part in gathered(state) for key, value in part.items()}
