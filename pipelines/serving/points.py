"""Points of an answer as data: in pixels of the picture or video that the client sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molmo_core.preprocessing.points import Point, complete_tags

_OPENINGS, _CLOSING = ("<point", "<tracks"), "</"
_LONGEST = len("</points>")


class PointReader:
    """Reads the points of one answer while its text arrives. A point is told when its tag is complete.

    Args:
        metadata: what the preprocessor says of the prompt: `image_sizes` [(width, height)], or `video_size` (width, height).
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        video = metadata.get("video_size")
        self._video = video is not None
        self._sizes = [video] if video is not None else list(metadata.get("image_sizes") or ())
        self._text = ""  # what follows the last complete tag

    def push(self, text: str) -> list[dict[str, Any]]:
        """Adds text; returns the points that it completes: {"image", "x", "y", "label", "t"}.

        `image` counts the conversation's pictures from 0 (a video is number 0), x and y are pixels, `t` seconds in a video.
        """
        if not self._sizes:
            return []
        before = len(self._text)
        self._text += text
        points: list[dict[str, Any]] = []
        if ">" in text and _CLOSING in self._text[max(0, before - _LONGEST) :]:
            end = 0
            for tag in complete_tags(self._text):
                points += [placed for point in tag.points if (placed := self._placed(point, tag.label))]
                end = tag.end
            self._text = self._text[end:]
        opening = max(map(self._text.rfind, _OPENINGS))
        self._text = self._text[opening if opening >= 0 else -_LONGEST :]
        return points

    def _placed(self, point: Point, label: str | None) -> dict[str, Any] | None:
        """None: it is on a picture that there is not, or nobody knows on which."""
        if self._video:
            number, time = 0, point.block
        elif point.block is None:
            number, time = (0 if len(self._sizes) == 1 else -1), None
        else:
            number, time = int(point.block) - 1, None
        if not 0 <= number < len(self._sizes):
            return None
        width, height = self._sizes[number]
        return {"image": number, "x": round(point.x * width, 2), "y": round(point.y * height, 2), "label": label, "t": time}
