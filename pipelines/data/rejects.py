"""Records that cannot be used: why, how many, and when they are too many."""

from __future__ import annotations

import collections
from typing import Any

from molmo_core.config import ConfigError
from molmo_core.preprocessing.media import MediaError, TooManyPixels

RATE_FROM_ROWS = 100
"""While a run goes on, the share of rejected rows is judged over at least so many: one bad row of the first three is no reason to stop."""


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
    """More records of a source were unusable than the configuration allows."""


class Tally:
    """Rows in, out and rejected, by source and reason."""

    def __init__(self, max_reject_rate: float):
        self.max_reject_rate = max_reject_rate
        self.seen: collections.Counter[str] = collections.Counter()
        self.rejected: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.rows_out = 0

    def add(self, summary: dict[str, Any]) -> None:
        """Counts the summary of a shard."""
        self.seen.update(summary["rows_in"])
        self.rows_out += summary["rows_out"]
        for source, _, reason, _ in summary["rejected"]:
            self.rejected[source][reason] += 1

    @property
    def rows_in(self) -> int:
        return self.seen.total()

    @property
    def rows_rejected(self) -> int:
        return sum(c.total() for c in self.rejected.values())

    def by_reason(self) -> dict[str, int]:
        """Rejected rows of all sources, most frequent reason first."""
        return dict(sum(self.rejected.values(), collections.Counter()).most_common())

    def check(self, at_end: bool = False) -> None:
        """Raises TooManyRejected when a source is too bad, or all of them together are, or nothing is left at the end."""
        for source, reasons in self.rejected.items():
            if reasons.total() > self.max_reject_rate * max(self.seen[source], RATE_FROM_ROWS):
                raise TooManyRejected(self._told(source, reasons, self.seen[source]))
        if self.rows_rejected > self.max_reject_rate * max(self.rows_in, RATE_FROM_ROWS) or (at_end and not self.rows_out):
            worst = max(self.rejected, key=lambda source: self.rejected[source].total())
            reasons = collections.Counter(self.by_reason())
            raise TooManyRejected(
                self._told(f"{worst} and {len(self.seen) - 1} other files" if len(self.seen) > 1 else worst, reasons, self.rows_in)
            )

    def _told(self, source: str, reasons: collections.Counter[str], seen: int) -> str:
        shown = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
        limit = f"max_reject_rate={self.max_reject_rate:g}"
        return f"{source}: {reasons.total():,} of {seen:,} records rejected, more than {limit} allows ({shown})"


class RejectRate:
    """Counts unusable examples while training."""

    def __init__(self, limit: float):
        self.limit, self.packs = limit, 0
        self.rejected: collections.Counter[str] = collections.Counter()

    def add(self, rejected: list[list[Any]]) -> None:
        """Takes the rejects of each pack; raises ConfigError when there are too many."""
        self.packs += len(rejected)
        for source, row, reason, detail in (r for rejects in rejected for r in rejects):
            self.rejected[source] += 1
            if self.rejected[source] > self.limit * max(self.packs, RATE_FROM_ROWS):
                raise ConfigError(
                    f"{source}: {self.rejected[source]} unusable records in {self.packs} packs, more than data.max_reject_rate="
                    f"{self.limit:g} allows; the last was row {row} ({reason}: {detail})"
                )
