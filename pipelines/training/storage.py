"""The folder of a run, `<storage>/<name>`: on a disk, or behind a URL that pyarrow or fsspec knows (s3://..., gs://..., memory://...)."""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from pyarrow import fs

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
        """Raises ConfigError: a URL that neither pyarrow nor fsspec knows, or that cannot be reached."""
        root = absolute(storage)
        self.url = f"{root.partition('?')[0].rstrip('/')}/{name}" if "://" in root else f"{root}/{name}"
        self.filesystem, self.root = _opened(root)
        self.path = f"{self.root.rstrip('/')}/{name}"
        self.local = Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None
        """The folder, if it is on a disk."""

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading, at any place; raises FileNotFoundError."""
        if self.local is not None:
            return open(self.local / name, "rb")
        return cast(BinaryIO, io.BufferedReader(cast(Any, self.filesystem.open_input_file(f"{self.path}/{name}"))))

    def create(self, name: str) -> BinaryIO:
        """Opens a new file for writing from its beginning to its end. It is there before it is whole: for folders that `begin` began."""
        if self.local is not None:
            return open(self.local / name, "wb", buffering=1 << 20)
        return cast(BinaryIO, self.filesystem.open_output_stream(f"{self.path}/{name}"))

    def read(self, name: str) -> str | None:
        """A text file; None if it is not there."""
        try:
            with self.open(name) as file:
                return file.read().decode("utf-8")
        except FileNotFoundError:
            return None

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a file, and the folders that it is in."""
        data = content.encode("utf-8") if isinstance(content, str) else content
        if self.local is None:
            self.filesystem.create_dir(f"{self.path}/{name}".rpartition("/")[0])
            with self.create(name) as file:
                file.write(data)
        else:
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            try:
                temporary.write_bytes(data)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
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

    def begin(self, name: str) -> str:
        """Makes an empty folder for the files of what will be called `name`; returns its own name.

        On a disk it is called otherwise until it is whole. Behind a URL nothing can be renamed: there it is whole when the file is there
        that `publish` writes.
        """
        folder = f".{name}{PARTIAL}" if self.local is not None else name
        self.delete(folder)  # what a killed process left behind, or a damaged one
        self.filesystem.create_dir(f"{self.path}/{folder}")
        return folder

    def publish(self, name: str, last: str, content: str) -> None:
        """Makes a folder that `begin` began appear, whole: with `last`, a text file without which it is not."""
        if self.local is None:
            self.write(f"{name}/{last}", content)
        else:
            folder = self.local / f".{name}{PARTIAL}"
            self.write(f"{folder.name}/{last}", content)
            shutil.rmtree(self.local / name, ignore_errors=True)  # a damaged one
            folder.rename(self.local / name)
            _sync(self.local)

    def abandon(self, name: str) -> None:
        """Removes what `begin` began."""
        self.delete(f".{name}{PARTIAL}" if self.local is not None else name)

    def upload(self, folder: Path, name: str, last: str) -> None:
        """Copies a folder of this machine to behind the URL, its file `last` after all others."""
        with fs.LocalFileSystem().open_input_stream(str(folder / last)) as file:
            content = file.read()
        (folder / last).unlink()
        self.filesystem.create_dir(f"{self.path}/{name}")
        fs.copy_files(str(folder), f"{self.path}/{name}", fs.LocalFileSystem(), self.filesystem)
        self.write(f"{name}/{last}", content)

    def tidy(self) -> None:
        """Removes what processes that were killed left half-written on a disk."""
        if self.local is not None:
            for folder in (*self.local.glob(f".step_*{PARTIAL}"), *self.local.glob("step_*/.model.*")):
                shutil.rmtree(folder, ignore_errors=True)


def _opened(root: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a storage, and the path in it."""
    if "://" not in root:
        return fs.LocalFileSystem(), root
    try:
        return fs.FileSystem.from_uri(root)
    except (OSError, ValueError) as error:
        known = "nrecognized" not in str(error)
        problem: Exception = error
    if not known:
        try:
            filesystem, path = fsspec.url_to_fs(root)
            return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path
        except (OSError, ValueError, ImportError) as error:
            problem = error
    raise ConfigError(f"storage: {root}: {problem}") from None


def _sync(folder: Path) -> None:
    """Makes the names in a folder last, should the machine lose its power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
