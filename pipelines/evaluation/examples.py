"""Which answers the report's page shows, and their pictures."""

from __future__ import annotations

import base64
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipelines.data.sources import Records
from pipelines.evaluation.picture import Viewer

SIDE = 360
"""Pixels of a thumbnail's longer side."""
QUALITY = 82


class Example(NamedTuple):
    """An answer and what it is about."""

    row: dict[str, Any]
    """Of `results.SCHEMA`."""
    picture: str
    """A data URL; empty: there is none."""
    size: tuple[int, int]
    """(width, height) of the thumbnail."""
    missing: str
    """Why there is no picture, if there should be one."""
    single: bool
    """Whether it is one image, on which points can be drawn."""


def worst(kinds: np.ndarray, scores: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Indices of the questions with the lowest scores, none that is all right. Among equal ones the kinds of questions take turns.

    Args:
        kinds: int [questions].
        scores: float [questions], 0 to 1.
        count: how many at most.
        seed: chooses among equal ones.
    """
    candidates = np.random.RandomState(seed).permutation(np.flatnonzero(scores < 1))
    turns = np.zeros(len(candidates), np.int64)
    seen: dict[tuple[int, float], int] = {}
    for i, k in enumerate(candidates.tolist()):
        key = int(kinds[k]), float(scores[k])
        turns[i] = seen[key] = seen.get(key, -1) + 1
    return candidates[np.lexsort((kinds[candidates], turns, scores[candidates]))[:count]]


def sample(questions: int, count: int, seed: int = 0) -> np.ndarray:
    """Indices of questions drawn at random, in order."""
    return np.sort(np.random.RandomState(seed).permutation(questions)[:count])


def examples(rows: list[dict[str, Any]], records: Records) -> list[Example]:
    """The examples of rows; media that cannot be shown (any more) leave a reason."""
    viewer = Viewer()
    shown: dict[int, Example] = {}
    try:
        for row in rows:
            if row["record"] not in shown:
                shown[row["record"]] = _thumbnail(viewer.pixels(records, row["record"]))
    finally:
        viewer.close()
    return [shown[row["record"]]._replace(row=row) for row in rows]


def _thumbnail(pixels: np.ndarray | str | None) -> Example:
    if not isinstance(pixels, np.ndarray):
        return Example({}, "", (0, 0), pixels or "", False)
    single = pixels.ndim == 3
    image = Image.fromarray(pixels) if single else _tiles(pixels)
    scale = SIDE / max(image.size)
    # Enlarged pixels stay squares: one sees what the model saw.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return Example({}, f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size, "", single)


def _tiles(frames: np.ndarray) -> Image.Image:
    """Frames [T, h, w, 3] in rows of two."""
    count, height, width, _ = frames.shape
    sheet = Image.new("RGB", (min(2, count) * width, -(-count // 2) * height))
    for k, frame in enumerate(frames):
        sheet.paste(Image.fromarray(frame), (k % 2 * width, k // 2 * height))
    return sheet
