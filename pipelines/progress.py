"""The progress of jobs that go through records: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0


class RecordProgress:
    """How many of the records are done, in a `with` block.

    Args:
        what: the job's name.
        total: number of records.
        done: how many were done before.
    """

    def __init__(self, what: str, total: int, done: int = 0):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("records ·{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(what, total=total, completed=done, note="")
        self._what, self._total, self._shown = what, total, time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Shows that so many are done, and a few words on how it goes."""
        self._bar.update(self._task, completed=done, note=f" {note} ·" if note else "")
        if not self._bar.console.is_terminal and time.monotonic() - self._shown > LINE_EVERY_S:  # a log shows no bar until the end
            self._shown = time.monotonic()
            print(f"{self._what}: {done:,} of {self._total:,} records{f', {note}' if note else ''}", file=sys.stderr, flush=True)

    def __enter__(self) -> RecordProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
