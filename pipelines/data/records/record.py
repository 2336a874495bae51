"""One row of a record file."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Record:
    """One row as it is in its file."""

    source: str
    row: int
    data: dict[str, Any]
