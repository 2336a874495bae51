"""Work on the device that can pause between two steps of the answers."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Slices = Generator[None, None, T]
"""Pauses wherever it yields, and returns its result."""


def go_on(slices: Slices[T]) -> T | None:
    """Does the next slice; the result if it was the last one."""
    try:
        next(slices)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    return None


def finish(slices: Slices[T]) -> T:
    """Does all that is left."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
