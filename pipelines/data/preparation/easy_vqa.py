"""The easy-vqa data set as records: an image, questions about it and a pointing task whose truth comes from the pixels.

The PyPI package easy-vqa 1.0 (MIT) carries 4,000 + 1,000 drawings of one coloured figure on a plain background and 38,575 + 9,673
questions in a published split. Its files are found through the package's metadata: importing it would import TensorFlow.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from molmo_core.config import ConfigError
from pipelines.files import write_text

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
# An image has two to twenty-one questions: more than this are shared out over two training records, for sequences of similar lengths.
TRAIN_QUESTIONS = 12
# What is learned last counts more in the loss: places, shapes, and comparing a question's word with the picture.
WEIGHTS = {"pointing": 9.0, "shape": 6.0, "yes_no": 5.0, "colour": 1.0}
Split = Literal["train", "test"]
NAMES = {"easy-vqa": False, "easy-vqa-points": True}
"""What a preparation calls the data set; whether pointing tasks hold coordinates (`with_points`)."""


def folder() -> Path:
    """The package's data folder.

    Raises:
        ConfigError: easy-vqa is not installed.
    """
    try:
        files = importlib.metadata.files("easy-vqa") or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("easy-vqa is not installed: pip install easy-vqa==1.0 (or the project's [demo] extra)") from None
    answers = next((f for f in files if f.name == "answers.txt"), None)
    if answers is None:
        raise ConfigError("the installed easy-vqa has no answers.txt; install easy-vqa==1.0 again")
    return Path(str(answers.locate())).parent


def question_type(answer: str) -> str:
    """`shape`, `colour` or `yes_no`, by what the answer is."""
    return "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes_no"


def centre(pixels: np.ndarray) -> tuple[float, float]:
    """(x, y) of the figure's centroid in percent of the width and height.

    Args:
        pixels: [h, w, 3] uint8. The background is the colour of the border; blended edge pixels count in proportion.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colours, counts = np.unique(border, axis=0, return_counts=True)
    distance = np.abs(pixels.astype(np.float64) - colours[counts.argmax()]).sum(-1)
    weight = distance / distance.max()
    weight[weight < 0.1] = 0
    height, width = weight.shape
    x = (weight.sum(0) @ (np.arange(width) + 0.5)) / weight.sum()
    y = (weight.sum(1) @ (np.arange(height) + 0.5)) / weight.sum()
    return round(float(100 * x / width), 1), round(float(100 * y / height), 1)


def records(split: Split, limit: int | None = None) -> list[dict[str, Any]]:
    """Records of a split, in the order of the image numbers; `limit`: only the first ones.

    Each is `{"image": path, "message_list": [{"style", "question", "answer", "type", "weight"}, ...], "metadata"}`; `type` is shape,
    colour, yes_no or pointing, and metadata holds the figure's name and its `point` (x, y in percent). A test image is one record,
    a training image as many as it takes to have at most `TRAIN_QUESTIONS` questions in each.
    """
    base = folder() / split
    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in json.loads((base / "questions.json").read_text()):
        questions[image].append((question, answer))
    made: list[dict[str, Any]] = []
    for image, pairs in sorted(questions.items()):
        if limit is not None and len(made) >= limit:
            break
        parts = math.ceil(len(pairs) / TRAIN_QUESTIONS) if split == "train" else 1
        path, figure = base / "images" / f"{image}.png", _figure(pairs)
        with Image.open(path) as picture:
            place = centre(np.asarray(picture.convert("RGB")))
        made += [_record(path, pairs[part::parts], figure, place) for part in range(parts)]
    return made[:limit]


def _record(path: Path, pairs: list[tuple[str, str]], figure: str, place: tuple[float, float]) -> dict[str, Any]:
    x, y = (round(value) for value in place)  # 1 % is less than a pixel of these images
    point = f'<point x="{x}" y="{y}" alt="{figure}">{figure}</point>'
    asked = [*((q, a, question_type(a)) for q, a in pairs), (f"Point to the {figure}.", point, "pointing")]
    annotations = [{"style": "demo", "question": q, "answer": a, "type": t, "weight": WEIGHTS[t]} for q, a, t in asked]
    return {"image": str(path), "message_list": annotations, "metadata": {"figure": figure, "point": list(place)}}


def with_points(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose pointing task has `label`, `points` (percent) and `point_scale` in place of a written answer."""
    *others, pointing = record["message_list"]
    task = {key: value for key, value in pointing.items() if key != "answer"}
    about = record["metadata"]
    task |= {"style": "pointing", "label": about["figure"], "points": [about["point"]], "point_scale": 100}
    return {**record, "message_list": [*others, task]}


def _figure(pairs: list[tuple[str, str]]) -> str:
    """The figure's name as far as the questions give it away, else "shape"."""
    for question, answer in pairs:
        if answer in SHAPES:
            return answer
        named = next((shape for shape in SHAPES if shape in question), None)
        presupposed = question.startswith("what color is the") or "color of the" in question
        if named and (presupposed or (answer == "yes") != bool({"not", "no"} & set(question.rstrip("?").split()))):
            return named
    return "shape"


def write(split: Split, path: Path, limit: int | None = None, points: bool = False) -> int:
    """Writes a split's records as JSON lines, unless they are there; returns their number. `points`: those of `with_points`."""
    rows = records(split, limit)
    rows = [with_points(row) for row in rows] if points else rows
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        write_text(path, text)
    return len(rows)
