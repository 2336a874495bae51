"""Points in the forms in which people write them."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from typing import Any

from pipelines.data.records import unread
from pipelines.data.records.fields import Fields
from pipelines.data.rejects import Rejected

_FORMS = (
    "a list of [x, y] (pixels, or of point_scale), a list of {x, y} (percent, or of point_scale), or {x: [...], y: [...]} (pixels, or of "
    "point_scale)"
)


def read_points(value: Any, row: Fields, counts: Counter[str]) -> dict[str, Any]:
    """`points` as [[x, y], ...], and `point_scale` unless they are pixels.

    PixMo-Points gives objects in percent, PixMo-Count columns in pixels; `point_scale` beside them comes first.
    """
    where = f"{row.where}points"
    scale = row.take_all("point_scale")
    columns = isinstance(value, dict)
    percent = False
    try:
        if columns:
            pairs: list[Any] = list(zip(value["x"], value["y"], strict=True))
            rest = {name: given for name, given in value.items() if name not in ("x", "y")}
            _judge(rest, f"{where}.", counts)
        else:
            percent = all(isinstance(point, dict) for point in value)
            pairs = [_pair(point, f"{where}[{i}].", counts) if isinstance(point, dict) else point for i, point in enumerate(value)]
        points = [[float(x), float(y)] for x, y in pairs]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise Rejected("record: bad points", f"{where}: {_FORMS} is needed, found {reprlib.repr(value)}") from None
    if not all(map(math.isfinite, (v for point in points for v in point))):
        raise Rejected("record: bad points", f"{where}: NaN or Infinity among them")
    return {"points": points, **(scale or ({"point_scale": 100} if percent else {}))}


def _pair(point: dict[str, Any], where: str, counts: Counter[str]) -> tuple[Any, Any]:
    if len(point) > 2:
        _judge({name: given for name, given in point.items() if name not in ("x", "y")}, where, counts)
    return point["x"], point["y"]


def _judge(rest: dict[str, Any], where: str, counts: Counter[str]) -> None:
    unread.judge(Fields(rest, where), counts, inside=True)
