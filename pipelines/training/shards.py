"""How torch.distributed.checkpoint writes to and reads from a run's storage: straight, without a copy on this machine's disk."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase

from molmo_core.checkpoint.checksums import Checksums, Sum
from pipelines.training.storage import Storage

METADATA_NAME = ".metadata"


class ShardWriter(FileSystemWriter):
    """Writes this rank's shards into a folder of a storage. What it wrote is summed up on its way there."""

    def __init__(self, storage: Storage, folder: str):
        super().__init__(folder, sync_files=False)
        self.path, self.files = folder, _Files(storage)
        self.fs = cast(Any, self.files)

    @property
    def checksums(self) -> Checksums:
        """Of the files written, by their name in the folder."""
        return {name.rpartition("/")[2]: found for name, found in self.files.written.items()}


class ShardReader(FileSystemReader):
    """Reads a checkpoint from a folder of a storage."""

    def __init__(self, storage: Storage, folder: str):
        super().__init__(folder)
        self.path, self.fs = folder, cast(Any, _Files(storage))


class _Files(FileSystemBase):
    """Files of a storage. Paths are relative to it."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.written: Checksums = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        name = os.fspath(path)
        if mode == "rb":
            with self.storage.open(name) as file:
                yield cast(io.IOBase, file)
            return
        stream = _Summed(self.storage.create(name))
        try:
            with contextlib.closing(stream):
                yield cast(io.IOBase, stream)
        except Exception:
            if stream.error is not None:
                raise stream.error from None  # torch's writer would speak of its own state after it
            raise
        self.written[name] = stream.sum.result()

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        old, new = os.fspath(path), os.fspath(new_path)
        self.storage.filesystem.move(f"{self.storage.path}/{old}", f"{self.storage.path}/{new}")
        self.written[new] = self.written.pop(old)

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        pass  # Storage.begin has made it

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return self.storage.exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self.storage.delete(os.fspath(path))


class _Summed:
    """A file that is written from its beginning to its end, summed up meanwhile. Closed, it is on the disk."""

    def __init__(self, file: BinaryIO):
        self.file, self.sum = file, Sum()
        self.error: OSError | None = None
        """The first one."""
        self._closed = False

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sum.add(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.sum.bytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self.file:
            if self.error is None and isinstance(self.file, io.BufferedWriter):
                self.file.flush()
                os.fsync(self.file.fileno())
