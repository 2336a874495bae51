"""Files that are whole whenever they are there: written beside their place, then moved into it; and places that do not last."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from molmo_core.config import ConfigError


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole whenever it is there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file that is whole whenever it is there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file that is whole whenever it is there."""
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)


def is_temporary(path: Path | str) -> bool:
    """Whether a local path is inside the copy of its working directory that Ray unpacks for a submitted job, and deletes afterwards."""
    parts = Path(path).absolute().parts
    return any(part == "working_dir_files" and inner.startswith("_ray_pkg_") for part, inner in itertools.pairwise(parts))


def check_lasting(path: Path | str, setting: str) -> None:
    """Raises ConfigError for a local path that is temporary in that sense."""
    if "://" not in str(path) and is_temporary(path):
        raise ConfigError(
            f"{setting}={path}: is in the copy of a submitted job's working directory, which Ray deletes; "
            "give the full path of a folder that all nodes share"
        )


def output_folder(output: str) -> Path:
    """The folder of an output, made if it is not there. Raises ConfigError if it is temporary or cannot be written."""
    check_lasting(output, "output")
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written: {error}") from None
    return folder
