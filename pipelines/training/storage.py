"""The folder of a run, `<storage>/<name>`: on a disk, or behind a URL that pyarrow knows (s3://..., gs://...)."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs
from ray.train import Checkpoint

from molmo_core.config import ConfigError
from pipelines.files import check_lasting

STEP = re.compile(r"step_(\d{6,})")
PARTIAL = ".partial"


def step_name(step: int) -> str:
    """The folder of a step's checkpoint, e.g. `step_000123`."""
    return f"step_{step:06d}"


def absolute(storage: str) -> str:
    """A URL as it is, a path in full; raises ConfigError for a folder that would be deleted with a submitted job."""
    check_lasting(storage, "storage")
    return storage if "://" in storage else str(Path(storage).absolute())


class Storage:
    """Files of one run. Paths are relative to its folder; everything that is written is there whole or not at all."""

    def __init__(self, storage: str, name: str):
        """Raises ConfigError: a URL that pyarrow does not know, or cannot reach."""
        root = absolute(storage)
        self.url = f"{root.partition('?')[0].rstrip('/')}/{name}" if "://" in root else f"{root}/{name}"
        try:
            self.filesystem, path = fs.FileSystem.from_uri(root) if "://" in root else (fs.LocalFileSystem(), root)
        except (OSError, ValueError) as error:
            raise ConfigError(f"storage: {storage}: {error}") from None
        self.path = f"{path.rstrip('/')}/{name}"
        self.local = Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None
        """The folder, if it is on a disk."""

    def read(self, name: str) -> str | None:
        """A text file; None if it is not there."""
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
                return file.read().decode("utf-8")
        except FileNotFoundError:
            return None

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a file, and the folders that it is in."""
        data = content.encode("utf-8") if isinstance(content, str) else content
        if self.local is None:
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
                file.write(data)
        else:
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            temporary.write_bytes(data)
            temporary.replace(target)

    def exists(self, name: str) -> bool:
        return self.filesystem.get_file_info(f"{self.path}/{name}").type != fs.FileType.NotFound

    def delete(self, name: str) -> None:
        """Deletes a file, or a folder and what is in it, if it is there."""
        path = f"{self.path}/{name}"
        kind = self.filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            self.filesystem.delete_file(path)

    def steps(self) -> list[int]:
        """Steps whose checkpoint folders are there, damaged ones included; the newest first."""
        entries = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        found = (STEP.fullmatch(entry.base_name) for entry in entries if entry.type == fs.FileType.Directory)
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def checkpoint(self, name: str) -> Checkpoint:
        """A checkpoint folder as Ray Train's: `as_directory()` gives it on a disk of this machine."""
        return Checkpoint(f"{self.path}/{name}", filesystem=self.filesystem)

    @contextlib.contextmanager
    def scratch(self, name: str, rank: int) -> Iterator[Path]:
        """An empty folder to write a checkpoint's files into: the same one for all ranks on a disk, one for each otherwise.

        It is removed when the block fails. `upload` and `publish` make of it what is called `name`.
        """
        if self.local is not None:
            folder = self.local / f".{name}{PARTIAL}"
        else:
            folder = Path(tempfile.gettempdir()) / f"molmo-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}-{rank}"
        if self.local is None or rank == 0:  # what a killed process left behind
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.local is None:
            shutil.rmtree(folder)

    def upload(self, folder: Path, name: str, last: str | None = None) -> None:
        """Copies a rank's files to where they belong, `last` after all others; on a disk nothing needs to be moved yet."""
        if self.local is not None:
            return
        self.filesystem.create_dir(f"{self.path}/{name}")
        if last is not None:
            with tempfile.TemporaryDirectory() as kept:
                shutil.move(folder / last, Path(kept) / last)
                fs.copy_files(str(folder), f"{self.path}/{name}", fs.LocalFileSystem(), self.filesystem)
                shutil.move(Path(kept) / last, folder / last)
            self.publish(folder, name, last)
        else:
            fs.copy_files(str(folder), f"{self.path}/{name}", fs.LocalFileSystem(), self.filesystem)

    def publish(self, folder: Path, name: str, last: str) -> None:
        """Makes a checkpoint appear, when all ranks have uploaded their files: with `last`, the file without which it is not whole."""
        if self.local is not None:
            shutil.rmtree(self.local / name, ignore_errors=True)  # a damaged one
            folder.rename(self.local / name)
        else:
            fs.copy_files(str(folder / last), f"{self.path}/{name}/{last}", fs.LocalFileSystem(), self.filesystem)

    def tidy(self) -> None:
        """Removes what processes that were killed left half-written on a disk."""
        if self.local is not None:
            for folder in (*self.local.glob(f".step_*{PARTIAL}"), *self.local.glob("step_*/.model.*")):
                shutil.rmtree(folder, ignore_errors=True)
