"""Checksums of a folder's files, kept beside them in `checksums.json`: damage is found before it is trained on or served.

CRC-32 finds every damage of up to 32 bits in a row, and 4 billion in 4 billion and one others, at 4 GB a second and core (measured;
blake2b does 0.9, SHA-256 1.8). It is not a defence against people.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from molmo_core.checkpoint.folder import CheckpointError

CHECKSUMS_NAME = "checksums.json"
BLOCK_BYTES = 8 << 20

Checksums = dict[str, dict[str, Any]]
"""By file name, relative to the folder: `bytes` and `crc32` (eight hexadecimal digits)."""


def checksums(folder: Path, names: Iterable[str]) -> Checksums:
    """Reads files and sums them up."""
    return {name: {"bytes": (folder / name).stat().st_size, "crc32": _crc32(folder / name)} for name in names}


def files_of(folder: Path) -> list[str]:
    """Names of all files in a folder and below, but for the checksums themselves; sorted."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f != folder / CHECKSUMS_NAME)


def write_checksums(folder: Path, found: Mapping[str, Any] | None = None) -> None:
    """Writes the checksums of a folder: `found`, or those of all its files as they are now."""
    content = dict(checksums(folder, files_of(folder)) if found is None else found)
    (folder / CHECKSUMS_NAME).write_text(json.dumps({"files": content}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> Checksums | None:
    """What was written; None if there is nothing.

    Raises:
        ValueError: the file of the checksums is itself damaged.
    """
    try:
        content = json.loads((folder / CHECKSUMS_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{CHECKSUMS_NAME}: damaged (not JSON)") from None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(f, dict) and f.keys() == {"bytes", "crc32"} for f in files.values()):
        raise ValueError(f"{CHECKSUMS_NAME}: damaged (not what was written)")
    return files


def damage(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with files of a folder, a line for each; empty if nothing is."""
    found = []
    for name, sums in expected.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != sums["bytes"]:
                found.append(f"{name}: {size:,} bytes of {sums['bytes']:,}")
            elif _crc32(path) != sums["crc32"]:
                found.append(f"{name}: its content has changed since it was written (checksum)")
        except FileNotFoundError:
            found.append(f"{name}: missing")
        except OSError as error:
            found.append(f"{name}: cannot be read ({error.strerror})")
    return found


def check_folder(folder: Path) -> None:
    """Reads a checkpoint's files and compares them with their checksums; a folder without any passes.

    A part that is not there at all (`tokenizer/`) is not missed here: the weights can be loaded without it, and what reads it says so.

    Raises:
        CheckpointError: naming every file that is not as it was written.
    """
    try:
        expected = (read_checksums(folder) if folder.is_dir() else None) or {}
        found = damage(folder, {name: sums for name, sums in expected.items() if (folder / name).parent.is_dir()})
    except ValueError as error:
        found = [str(error)]
    if found:
        raise CheckpointError(
            f"{folder} differs from what was written: {'; '.join(found)}. Copy or export it again; "
            f"if it was changed on purpose, delete {CHECKSUMS_NAME} there."
        )


def _crc32(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
