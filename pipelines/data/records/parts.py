"""Parts of records: rows that are held out of a preparation, chosen by a pure function, and the small file that names them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molmo_core.config import ConfigError
from pipelines.files import write_text

SUFFIX = ".part.json"
TEST = f"test{SUFFIX}"
_FIRST, _SECOND, _STEP = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15  # of splitmix64


def held_out(seed: int, rows: int, share: float) -> np.ndarray:
    """bool [rows]: which of the first `rows` rows are held out. Each is decided by its own number alone, so more rows change nothing
    for those that were there."""
    bits = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(seed * _SECOND % (1 << 64))
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows that a preparation holds out.

    Attributes:
        records, format: of what, as they are opened.
        seed, share, rows: arguments of `held_out`.
        sizes: [path, rows, bytes] of each file: of others the numbers would mean other rows.
    """

    records: str
    format: str
    seed: int
    share: float
    rows: int
    sizes: list[list[Any]]

    @classmethod
    def of(cls, records: str, format: str, seed: int, share: float, rows: int, stamp: Sequence[Sequence[Any]]) -> Part:
        """Args:
            stamp: `Records.stamp` of the records.

        Raises:
            ConfigError: one of the two parts would be empty.
        """
        records = records if "://" in records else os.path.abspath(records)
        part = cls(records, format, seed, share, rows, [list(source[:3]) for source in stamp])
        number = len(part.numbers())
        if number in (0, rows):
            raise ConfigError(f"split.test={share}: holds out {number} of {rows} records; choose another share, or prepare more records")
        return part

    def numbers(self) -> np.ndarray:
        """int64: the rows of the part, in order."""
        return np.flatnonzero(held_out(self.seed, self.rows, self.share))

    def others(self) -> np.ndarray:
        """int64: the rows that are left, in order."""
        return np.flatnonzero(~held_out(self.seed, self.rows, self.share))

    def write(self, path: Path) -> None:
        """Writes the file that `open_records` opens as these rows."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: str) -> Part:
        """Raises ConfigError if it is no such file."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: not a part of records as jobs.prepare writes it: {error}") from None

    def check(self, path: str, stamp: Sequence[Sequence[Any]]) -> None:
        """Raises ConfigError if the records are not those of which the part was made."""
        for (name, *before), (_, rows, size, *_) in zip(self.sizes, stamp):
            if before != [rows, size]:
                raise ConfigError(f"{path}: {name} was changed since these rows were held out; prepare again, in an empty folder")
        if len(self.sizes) != len(stamp):
            raise ConfigError(f"{path}: {self.records} has other files than when these rows were held out; prepare again")
