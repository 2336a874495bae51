"""Checksums of a folder's files, kept beside them in `checksums.json`: damage is found before it is trained on or served.

CRC-32 finds every damage of up to 32 bits in a row, and 4 billion in 4 billion and one others, at 4 GB a second and core (measured;
blake2b does 0.9, SHA-256 1.8). It is not a defence against people.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from molmo_core.checkpoint.folder import CheckpointError

CHECKSUMS_NAME = "checksums.json"
BLOCK_BYTES = 8 << 20

Checksums = dict[str, dict[str, Any]]
"""By file name, relative to the folder: `bytes` and `crc32` (eight hexadecimal digits)."""


class Sum:
    """The checksum of bytes that go by."""

    def __init__(self) -> None:
        self.bytes = self._crc32 = 0

    def add(self, data: Any) -> None:
        """Takes the next bytes (bytes, or anything with their buffer)."""
        self._crc32 = zlib.crc32(data, self._crc32)
        self.bytes += memoryview(data).nbytes

    def result(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "crc32": f"{self._crc32:08x}"}


def checksum(file: BinaryIO) -> dict[str, Any]:
    """Reads a file to its end and sums it up."""
    total = Sum()
    while block := file.read(BLOCK_BYTES):
        total.add(block)
    return total.result()


def files_of(folder: Path) -> list[str]:
    """Names of all files in a folder and below, but for the checksums themselves; sorted."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f != folder / CHECKSUMS_NAME)


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files of a folder as they are now."""
    found = {}
    for name in files_of(folder):
        with open(folder / name, "rb") as file:
            found[name] = checksum(file)
    (folder / CHECKSUMS_NAME).write_text(as_text(found), encoding="utf-8")


def as_text(found: Mapping[str, Any]) -> str:
    """The content of a folder's `checksums.json`."""
    return json.dumps({"files": dict(found)}, indent=1, sort_keys=True) + "\n"


def from_text(text: str | bytes | None) -> Checksums:
    """What `as_text` was given.

    Raises:
        ValueError: there is no such file (None), or it is itself damaged.
    """
    if text is None:
        raise ValueError(f"{CHECKSUMS_NAME}: missing")
    try:
        content = json.loads(text)
    except ValueError:
        raise ValueError(f"{CHECKSUMS_NAME}: damaged (not JSON)") from None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(f, dict) and f.keys() == {"bytes", "crc32"} for f in files.values()):
        raise ValueError(f"{CHECKSUMS_NAME}: damaged (not what was written)")
    return files


def damage(expected: Mapping[str, Mapping[str, Any]], open_file: Callable[[str], BinaryIO]) -> list[str]:
    """What is wrong with files, a line for each; empty if nothing is.

    Args:
        expected: by name, as `checksum` gives it.
        open_file: opens the file of a name for reading.
    """
    found = []
    for name, sums in expected.items():
        try:
            with open_file(name) as file:
                now = checksum(file)
        except FileNotFoundError:
            found.append(f"{name}: missing")
        except OSError as error:
            found.append(f"{name}: cannot be read ({error.strerror or error})")
        else:
            if now["bytes"] != sums["bytes"]:
                found.append(f"{name}: {now['bytes']:,} bytes of {sums['bytes']:,}")
            elif now["crc32"] != sums["crc32"]:
                found.append(f"{name}: its content has changed since it was written (checksum)")
    return found


def check_folder(folder: Path) -> None:
    """Reads a checkpoint's files and compares them with their checksums; a folder without any passes.

    A part that is not there at all (`tokenizer/`) is not missed here: the weights can be loaded without it, and what reads it says so.

    Raises:
        CheckpointError: naming every file that is not as it was written.
    """
    if not (folder / CHECKSUMS_NAME).is_file():
        return
    try:
        expected = from_text((folder / CHECKSUMS_NAME).read_bytes())
        present = {name: sums for name, sums in expected.items() if (folder / name).parent.is_dir()}
        found = damage(present, lambda name: open(folder / name, "rb"))  # noqa: SIM115  (damage closes it)
    except ValueError as error:
        found = [str(error)]
    if found:
        raise CheckpointError(
            f"{folder} differs from what was written: {'; '.join(found)}. Copy or export it again; "
            f"if it was changed on purpose, delete {CHECKSUMS_NAME} there."
        )
