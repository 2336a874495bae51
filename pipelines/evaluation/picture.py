"""A picture of answers: each image with its question, what the model said, and the points it showed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from molmo_core.preprocessing.media import load_image
from molmo_core.preprocessing.points import extract_points
from pipelines.data.records.media import fetch
from pipelines.data.records.reading import read_record
from pipelines.data.sources import Records

COLUMNS, SIDE, MARGIN, TEXT_LINES, LINE = 4, 224, 16, 5, 17
RIGHT, WRONG, INK, GREY = (22, 128, 61), (190, 18, 60), (31, 41, 55), (107, 114, 128)
WRAP = 34


def draw_answers(results: Sequence[dict[str, Any]], records: Records, samples: int) -> Image.Image:
    """A sheet of sample answers: records spread over the set, question types in turn. Green is right, red wrong."""
    chosen = choose(results, samples)
    rows = max(1, -(-len(chosen) // COLUMNS))
    cell_width, cell_height = SIDE + 2 * MARGIN, SIDE + TEXT_LINES * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * cell_width, rows * cell_height), "white")
    for i, (result, question) in enumerate(chosen):
        origin = (i % COLUMNS * cell_width + MARGIN, i // COLUMNS * cell_height + MARGIN)
        _draw(sheet, origin, _image(records, result["record"]), question)
    return sheet


def choose(results: Sequence[dict[str, Any]], samples: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(record's result, question) pairs: records at even distances, their question types taking turns."""
    usable = [result for result in results if result.get("questions")]
    types = sorted({question["type"] for result in usable for question in result["questions"]})
    picked = []
    for k in range(min(samples, len(usable))):
        result = usable[k * len(usable) // min(samples, len(usable))]
        wanted = types[k % len(types)]
        picked.append((result, next((q for q in result["questions"] if q["type"] == wanted), result["questions"][0])))
    return picked


def _image(records: Records, i: int) -> Image.Image | None:
    example = read_record(records[i])
    reference = example.get("image") or next(iter(example.get("images", ())), None)
    return None if reference is None else Image.fromarray(load_image(fetch(reference)))


def _draw(sheet: Image.Image, origin: tuple[int, int], image: Image.Image | None, question: dict[str, Any]) -> None:
    x, y = origin
    draw = ImageDraw.Draw(sheet)
    if image is not None:
        scale = SIDE / max(image.size)
        # Enlarged pixels stay squares: one sees what the model saw.
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)
        sheet.paste(shown, (x, y))
        draw.rectangle((x - 1, y - 1, x + shown.width, y + shown.height), outline=(209, 213, 219))
        for point in extract_points(question["prediction"], shown.width, shown.height):
            _mark(draw, x + point.x, y + point.y)
    font = ImageFont.load_default(13)
    colour = RIGHT if question["score"] >= 0.5 else WRONG
    lines = [(line, INK) for line in textwrap.wrap(question["question"], WRAP)[:2]]
    lines += [(line, colour) for line in textwrap.wrap(question["prediction"] or "(nothing)", WRAP)[:2]]
    if question["score"] < 0.5:
        lines += [(line, GREY) for line in textwrap.wrap(f"expected: {question['answers'][0]}", WRAP)[:1]]
    for k, (line, ink) in enumerate(lines[:TEXT_LINES]):
        draw.text((x, y + SIDE + 6 + k * LINE), line, fill=ink, font=font)


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    """A ring and a cross, visible on any background."""
    for width, colour in ((5, "white"), (2, (219, 39, 119))):
        draw.ellipse((x - 11, y - 11, x + 11, y + 11), outline=colour, width=width)
        draw.line((x - 17, y, x + 17, y), fill=colour, width=width)
        draw.line((x, y - 17, x, y + 17), fill=colour, width=width)
