"""What an answer is compared with: everything that a record says about the right answer, in one form for all metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels; the borders belong to it."""


class Target(NamedTuple):
    """Something to point at."""

    x: float
    y: float
    """Pixels."""
    at: float | None = None
    """The number of the image (from 1) or seconds of the video; None: there is one image."""
    mask: np.ndarray | None = None
    """bool [height, width]: a point on it hits."""
    box: Box | None = None
    """A point in it hits; used where there is no mask."""
    object: Any = None
    """Of a track: which object this is; it keeps its name over the frames."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """The reference of one question. Only what the record has is given; a metric says which of it it needs.

    Attributes:
        answers: reference answers, each as good as the others (VQA: one an annotator).
        captions: reference descriptions, for metrics of longer texts.
        options, option: the texts of a multiple choice, and the number of the right one.
        option_names: what the options are called in the prompt (letters); empty: they have no names there.
        count: how many there are.
        targets: what is to be pointed at; an empty list: nothing.
        tracks: the targets of every frame of a video, each with its `at` and `object`.
        spans: (start, end) in seconds of the right moments of a video.
        image_sizes: (width, height) in pixels of the images, or of the video's frames. Percent, where the record has no medium.
        category: what the record is counted under.
    """

    answers: Sequence[str] = ()
    captions: Sequence[str] = ()
    options: Sequence[str] = ()
    option: int | None = None
    option_names: Sequence[str] = ()
    count: int | None = None
    targets: Sequence[Target] | None = None
    tracks: Sequence[Target] | None = None
    spans: Sequence[tuple[float, float]] | None = None
    image_sizes: Sequence[tuple[int, int]] = ((100, 100),)
    category: str | None = None

    def has(self, part: str) -> bool:
        """Whether the record gives a part: for lists of texts a text, for everything else a value (an empty list of targets is one)."""
        value = getattr(self, part)
        return bool(len(value)) if part in _TEXTS else value is not None


_TEXTS = frozenset({"answers", "captions", "options", "option_names"})

Scores = Mapping[str, float]
"""The scores of one answer, by name."""
