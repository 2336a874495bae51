"""What all files of records and media share: paths, change detection, open handles."""

from __future__ import annotations

import abc
import os
import re
import urllib.request
from typing import Any

import fsspec

from pipelines.data.rejects import Rejected

_VERSION_FIELDS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
"""Where fsspec's filesystems say which version of a file they have, best first."""


def local_path(reference: str) -> str:
    """The path of a `file://` URL, percent-encoded or not; anything else stays as it is."""
    if not reference.startswith("file://"):
        return reference
    path = re.sub(r"^file://(localhost(?=/))?", "", reference)
    # A relative name joined to the URL of its folder is not encoded: "100%25.png" may be a file of that name.
    return path if os.path.exists(path) else urllib.request.url2pathname(path)


def version(path: str) -> tuple[int | None, int | str | None]:
    """Size in bytes and time of the last change in ns; of a remote file the ETag or time that its filesystem gives, if any."""
    if "://" not in path:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    filesystem, name = fsspec.url_to_fs(path)
    info = filesystem.info(name)
    return info.get("size"), next((str(info[field]) for field in _VERSION_FIELDS if info.get(field)), None)


class RecordFile(abc.ABC):
    """Base of the sources: keeps open handles (names that begin with `_open`) out of pickles.

    Attributes:
        path: as it was given.
        version: size and time of change when it was opened.
    """

    def __init__(self, path: str):
        self.path = path
        self.version = version(path)  # before it is read: a change meanwhile shows later

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_open")}

    def row_number(self, i: int) -> int:
        """Number of record `i` in its file, from 0 (JSON lines: blank lines count)."""
        return i

    @abc.abstractmethod
    def read(self, i: int) -> dict[str, Any]:
        """Record `i`; raises `Rejected` if it cannot be read."""

    def text(self, i: int) -> dict[str, Any]:
        """Record `i`, where that saves time without the bytes of its media."""
        return self.read(i)

    def _handle(self) -> Any:
        file = self.__dict__.get("_open_file")
        if file is None:
            self._open_archive = fsspec.open(self.path, "rb")  # kept: an archive is closed with it
            file = self._open_file = self._open_archive.open()
        return file

    def _bytes(self, start: int, size: int) -> bytes:
        file = self._handle()
        file.seek(start)
        return file.read(size)


def mapping(data: Any) -> dict[str, Any]:
    """`data`, if it is an object; else raises `Rejected`."""
    if not isinstance(data, dict):
        raise Rejected("record: not an object", f"found {type(data).__name__}")
    return data
