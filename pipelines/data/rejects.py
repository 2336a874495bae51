"""Records that cannot be used: why, how many, and when they are too many."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molmo_core.config import ConfigError
from molmo_core.preprocessing.media import MediaError, TooManyPixels

RATE_FROM_ROWS = 100
"""During a run the share of rejected rows is judged over at least so many: one bad row of the first three is not a reason to stop."""


class Rejected(Exception):
    """One record that cannot be used: `reason` is the category that reports count, `detail` the particulars."""

    def __init__(self, reason: str, detail: str = ""):
        detail = detail.encode("utf-8", "replace").decode()  # half a surrogate pair of a record could not be written into a report
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def unusable(kind: str, error: MediaError, where: str = "") -> Rejected:
    """The rejection of an image or a video that cannot be decoded."""
    return Rejected(f"{kind}: {'too many pixels' if isinstance(error, TooManyPixels) else 'undecodable'}", f"{where}{error}")


class TooManyRejected(ConfigError):
    """More examples of a source were unusable than the configuration allows."""


class Rejects:
    """The examples that were tried and those that could not be used, by source: the one rule of when these are too many.

    Preparation, streaming and evaluation count here. A share is one of the examples of a source (a file of records), or of all
    sources together, never of packs, batches or shards.

    Args:
        limit: largest share that may be unusable.
        setting: name of that limit in the configuration, for the message.
    """

    def __init__(self, limit: float, setting: str = "max_reject_rate"):
        self.limit, self.setting = limit, setting
        self.seen: collections.Counter[str] = collections.Counter()
        self.reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._last: dict[str, str] = {}

    def add(self, seen: Mapping[str, int], rejected: Iterable[Sequence[Any]] = ()) -> None:
        """Counts examples that were tried, by source, and those among them that are unusable: (source, row, reason, detail) of each."""
        self.seen.update(seen)
        for source, row, reason, detail in rejected:
            self.reasons[source][reason] += 1
            self._last[source] = f"row {row}: {reason}" + (f": {detail}" if detail else "")

    @property
    def total(self) -> int:
        """Unusable examples of all sources."""
        return sum(reasons.total() for reasons in self.reasons.values())

    def by_reason(self) -> dict[str, int]:
        """Unusable examples of all sources, most frequent reason first."""
        return dict(sum(self.reasons.values(), collections.Counter()).most_common())

    def check(self, at_end: bool = False) -> None:
        """Raises TooManyRejected when a source is too bad, or all of them together are, or nothing is left at the end."""
        for source, reasons in self.reasons.items():
            if reasons.total() > self.limit * max(self.seen[source], RATE_FROM_ROWS):
                raise TooManyRejected(self._told(source, source, reasons, self.seen[source]))
        total, seen = self.total, self.seen.total()
        nothing_left = at_end and 0 < total == seen
        if total > self.limit * max(seen, RATE_FROM_ROWS) or nothing_left:
            worst = max(self.reasons, key=lambda source: self.reasons[source].total())
            name = f"{worst} and {len(self.seen) - 1} other files" if len(self.seen) > 1 else worst
            raise TooManyRejected(self._told(name, worst, collections.Counter(self.by_reason()), seen))

    def _told(self, name: str, worst: str, reasons: collections.Counter[str], seen: int) -> str:
        over = f"more than {self.setting}={self.limit:g} allows" if reasons.total() > self.limit * seen else "nothing is left"
        shown = ", ".join(f"{n:,} x {reason}" for reason, n in reasons.most_common(5))
        return f"{name}: {reasons.total():,} of {seen:,} records rejected, {over} ({shown}; the last one of {worst} is {self._last[worst]})"
