"""A picture of answers: each image with its question, what the model said, and the points it showed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from molmo_core.preprocessing.media import MediaError
from molmo_core.preprocessing.points import extract_points
from molmo_core.preprocessing.videos import FrameSettings, load_frames
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import MAX_IMAGE_PIXELS
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected, unusable
from pipelines.data.sources import Records
from pipelines.evaluation.questions import media_of

COLUMNS, SIDE, MARGIN, TEXT_LINES, LINE = 4, 224, 16, 5, 17
RIGHT, WRONG, INK, GREY = (22, 128, 61), (190, 18, 60), (31, 41, 55), (107, 114, 128)
WRAP = 34
FRAMES = FrameSettings(max_frames=4, max_fps=1e9)
"""Frames of a video, at even distances, in two rows."""


def draw_answers(answers: Sequence[dict[str, Any]], records: Records) -> Image.Image:
    """A sheet of answers (`record`, `question`, `prediction`, `score`, `answers` of each). Green is right, red wrong.

    Media that cannot be shown (any more) leave their place to the reason.
    """
    rows = max(1, -(-len(answers) // COLUMNS))
    cell_width, cell_height = SIDE + 2 * MARGIN, SIDE + TEXT_LINES * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * cell_width, rows * cell_height), "white")
    viewer = Viewer()
    try:
        for i, answer in enumerate(answers):
            origin = (i % COLUMNS * cell_width + MARGIN, i // COLUMNS * cell_height + MARGIN)
            _draw(sheet, origin, viewer.pixels(records, answer["record"]), answer)
    finally:
        viewer.close()
    return sheet


def spread(kinds: np.ndarray, records: np.ndarray, count: int) -> list[int]:
    """Which questions to show: records at even distances, the kinds of questions taking turns.

    Args:
        kinds, records: int [questions], ordered by record.
        count: how many at most.
    """
    there, order, chosen = np.unique(records), np.unique(kinds), []
    for k in range(min(count, len(there))):
        of_record = np.flatnonzero(records == there[k * len(there) // min(count, len(there))])
        wanted = of_record[kinds[of_record] == order[k % len(order)]]
        chosen.append(int((wanted if len(wanted) else of_record)[0]))
    return chosen


class _ViewBuilder(ExampleBuilder):
    """Makes pixels to look at of a record's media."""

    def build(self, example: dict[str, Any], rng: np.random.RandomState | None) -> dict[str, Any]:
        """`pixels` uint8 [h, w, 3] of the first image, or [T, h, w, 3] of a video; none of a text. Raises `Rejected`."""
        self.decode(example)
        if "video" in example:
            try:
                return {"pixels": load_frames(example["video"], FRAMES, example.get("clip_start"), example.get("clip_end")).pixels}
            except MediaError as error:
                raise unusable("video", error) from None
        image = example.get("image", next(iter(example.get("images", ())), None))
        return {} if image is None else {"pixels": image}


class Viewer:
    """Shows the media of records; videos are decoded in a process of their own, until `close`."""

    def __init__(self) -> None:
        self._builder = IsolatedBuilder(_ViewBuilder(None, MAX_IMAGE_PIXELS))

    def pixels(self, records: Records, i: int) -> np.ndarray | str | None:
        """Of the first image [h, w, 3] or of frames of a video [T, h, w, 3], uint8; or why there are none (None: it is a text)."""
        try:
            example = media_of(read_record(records[i]))
            if example.get("images"):
                example["images"] = example["images"][:1]
            return self._builder.build(example, None).get("pixels")
        except Rejected as error:
            return str(error)

    def close(self) -> None:
        self._builder.close()


def _draw(sheet: Image.Image, origin: tuple[int, int], shown: np.ndarray | str | None, question: dict[str, Any]) -> None:
    x, y = origin
    draw = ImageDraw.Draw(sheet)
    if isinstance(shown, str):
        for k, line in enumerate(textwrap.wrap(f"not shown: {shown}", WRAP)[: SIDE // LINE]):
            draw.text((x, y + k * LINE), line, fill=GREY, font=ImageFont.load_default(13))
    elif shown is not None and shown.ndim == 4:
        for k, frame in enumerate(shown):
            _paste(sheet, frame, (x + k % 2 * (SIDE // 2), y + k // 2 * (SIDE // 2)), SIDE // 2 - 2)
    elif shown is not None:
        width, height = _paste(sheet, shown, origin, SIDE)
        for point in extract_points(question["prediction"], width, height):
            _mark(draw, x + point.x, y + point.y)
    font = ImageFont.load_default(13)
    colour = RIGHT if question["score"] >= 0.5 else WRONG
    lines = [(line, INK) for line in textwrap.wrap(question["question"], WRAP)[:2]]
    lines += [(line, colour) for line in textwrap.wrap(question["prediction"] or "(nothing)", WRAP)[:2]]
    if question["score"] < 0.5:
        lines += [(line, GREY) for line in textwrap.wrap(f"expected: {question['answers'][0]}", WRAP)[:1]]
    for k, (line, ink) in enumerate(lines[:TEXT_LINES]):
        draw.text((x, y + SIDE + 6 + k * LINE), line, fill=ink, font=font)


def _paste(sheet: Image.Image, pixels: np.ndarray, origin: tuple[int, int], side: int) -> tuple[int, int]:
    """Pastes a picture as large as fits into a square; returns its (width, height) there."""
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    # Enlarged pixels stay squares: one sees what the model saw.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    sheet.paste(image.resize(size, method), origin)
    x, y = origin
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=(209, 213, 219))
    return size


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    """A ring and a cross, visible on any background."""
    for width, colour in ((5, "white"), (2, (219, 39, 119))):
        draw.ellipse((x - 11, y - 11, x + 11, y + 11), outline=colour, width=width)
        draw.line((x - 17, y, x + 17, y), fill=colour, width=width)
        draw.line((x, y - 17, x, y + 17), fill=colour, width=width)
