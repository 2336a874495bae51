"""The task that gives one point of an object and asks where it goes: the track of that object after the point's time.

Source: the published Molmo2 and MolmoPoint code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

STYLE = "single_point_track"
"""Part of the names of its styles."""
_ANY = 0.2
"""How often training gives any point of the track in place of the first."""


class GivenPoint(NamedTuple):
    """The point that the question gives."""

    seconds: float
    xy: Any
    """As the record has it."""


def given_point(record: dict[str, Any], rng: np.random.RandomState | None = None) -> GivenPoint:
    """The point that a record's question gives: the first that is seen.

    Args:
        record: `timestamps` and `tracks` of one object.
        rng: draws another one sometimes (training).

    Raises:
        ValueError: there is not exactly one object, or it is never seen.
    """
    names = sorted({str(name) for objects in record["tracks"] for name in objects})
    if len(names) != 1:
        raise ValueError(f"the track of one given point needs tracks of one object; these are of {len(names)} ({', '.join(names)})")
    frames = zip(record["timestamps"], record["tracks"], strict=True)
    seen = [GivenPoint(float(seconds), xy) for seconds, objects in frames for xy in objects.values() if xy is not None]
    if not seen:
        raise ValueError(f"the track of one given point needs a point; {names[0]!r} is never seen")
    return seen[rng.randint(len(seen))] if rng is not None and rng.random_sample() < _ANY else seen[0]


def after(point: GivenPoint, record: dict[str, Any]) -> dict[str, Any]:
    """The record with what is asked for: `timestamps` and `tracks` after the point."""
    later = [i for i, seconds in enumerate(record["timestamps"]) if seconds > point.seconds]
    return {**record, **{field: [record[field][i] for i in later] for field in ("timestamps", "tracks")}}
