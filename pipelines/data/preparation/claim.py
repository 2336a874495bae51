"""Whose folder it is: what a preparation is made from, noted in its folder, so that no other continues there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from molmo_core.checkpoint.published_config import PROCESSOR_FILES
from molmo_core.config import ConfigError
from pipelines.data import schema
from pipelines.data.config import PrepareConfig
from pipelines.data.sources import Records
from pipelines.files import write_text
from pipelines.model_folder import model_folder

STATE = "prepare.json"


def open_folder(folder: Path) -> None:
    """Makes the folder; raises ConfigError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot be written ({error.strerror or error}); choose another folder") from None


class FolderLock:
    """Keeps every other preparation out of a folder, from here to `release`. The kernel releases it when this process ends, however it
    ends. It is on the folder itself: no file is left.

    Raises:
        ConfigError: another preparation is at work there, or nothing can be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder: int | None = None
        open_folder(folder)
        self._folder = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(
                f"output={folder}: another preparation is at work in this folder. Wait for it and run this again, or choose another output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF):
                self.release()
                raise
            # A filesystem without locks (EBADF: NFS, of a folder): nothing keeps two apart there, as nothing did before.

    def release(self) -> None:
        """Lets others in."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def __del__(self) -> None:
        self.release()


@contextlib.contextmanager
def claimed(folder: Path, config: PrepareConfig, records: Records) -> Iterator[None]:
    """Notes what is made in a folder, and takes it back if the block fails before a shard is made. A folder with shards of another
    preparation is refused; what one left that failed before its first shard is removed.

    Raises:
        ConfigError: the folder holds another preparation.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "actors", "max_reject_rate")}
    for name in ("split", "scenes", "text_model"):
        if settings[name] is None:
            del settings[name]  # as in folders from before there was one
    if config.scenes is not None:
        settings["scenes"].pop("drawings")  # where they are kept changes nothing
    sources = records.stamp
    text = json.dumps([schema.VERSION, settings, _model_text(config.model), sources], sort_keys=True)
    state = {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], "settings": settings, "sources": sources}
    path = folder / STATE
    found = json.loads(path.read_text()) if path.is_file() else None
    if found is not None and found["fingerprint"] != state["fingerprint"]:
        if _has_shards(folder):
            old = found["settings"]
            other = "the records" if found["sources"] != sources else "the model"
            changed = [k for k in {**settings, **old} if old.get(k) != settings.get(k)] or [other]
            raise ConfigError(f"{folder}: holds another preparation ({', '.join(changed)} changed); choose another output or delete it")
        for name in ("tokenizer", "text_model"):
            shutil.rmtree(folder / name, ignore_errors=True)  # of other settings
    write_text(path, json.dumps(state, indent=2) + "\n")
    try:
        yield
    except BaseException:
        if not _has_shards(folder):
            path.unlink(missing_ok=True)
        raise


def _has_shards(folder: Path) -> bool:
    return any(folder.glob("shard-*.json"))


def _model_text(model: str) -> str:
    """What a preparation takes of a model: its configuration, and the tokenizer of a model folder."""
    path = model_folder(model)
    names = ("config.yaml", "tokenizer/tokenizer.json", "config.json", "tokenizer.json", *PROCESSOR_FILES)
    files = [path] if path.is_file() else [path / name for name in names]
    return model if not path.exists() else "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
