"""Answers of MolmoPoint as text that any client reads."""

import numpy as np
import pytest

from molmo_core.preprocessing.point_places import PointPlaces
from molmo_core.preprocessing.point_reader import PointTextReader, read_points
from molmo_core.preprocessing.point_tokens import MARKS, PointStyle, PointWriter
from molmo_core.preprocessing.points import complete_tags, extract_points
from molmo_core.preprocessing.tiling import ImageSettings
from molmo_core.preprocessing.tokenizer import Tokenizer

SETTINGS = ImageSettings(crop_size=(56, 56), resize_mode="siglip", max_crops=4, overlap_margins=(1, 1), low_tokens_global_crop=True)
STYLES = [
    PointStyle(numbering=numbering, ends=ends, cells=cells)
    for numbering in ("no_space_id_last", "space_id_last", "no_space")
    for ends in (True, False)
    for cells in (True, False)
]


@pytest.fixture(scope="module")
def tokenizer(golden) -> Tokenizer:
    return Tokenizer.load(golden / "tokenizer", first_special_id=448, layout="molmo2")


def generated(tokenizer: Tokenizer, text: str, rows: np.ndarray | None) -> tuple[list[int], list[int]]:
    """The tokens that a model gives for a training answer, and what they stand for."""
    tokens: list[int] = []
    places: list[int] = []
    column, row, run = 0, -1, ""

    def flush() -> None:
        nonlocal run
        ids = tokenizer.encode(run)
        tokens.extend(ids)
        places.extend([-1] * len(ids))
        run = ""

    for character in text:
        if character not in MARKS:
            run += character
            continue
        flush()
        column = MARKS.index(character)
        row += column == 0
        tokens.append(tokenizer.point_token_ids[column])
        places.append(int(rows[row, column]))  # type: ignore[index]
    flush()
    return tokens, places


def placed(style: PointStyle, places: PointPlaces) -> PointPlaces:
    return PointPlaces(places.grids, places.pooled_idx, places.times, style.cells)


def read(tokenizer: Tokenizer, style: PointStyle, places: PointPlaces, text: str, rows: np.ndarray | None) -> str:
    """The readable text, which is the same however the tokens come."""
    places = placed(style, places)
    tokens, chosen = generated(tokenizer, text, rows)
    whole = tokenizer.decode(read_points(PointTextReader(tokenizer, places), tokens, chosen))
    reader, parts = PointTextReader(tokenizer, places), []
    for token, place in zip(tokens, chosen):
        parts += reader.push(token, place)
    assert tokenizer.decode(parts + reader.finish()) == whole
    return whole


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_points_of_an_image(tokenizer: Tokenizer, style: PointStyle) -> None:
    places = PointPlaces.of_images([(80, 60)], SETTINGS)
    writer = PointWriter(style, places, np.random.RandomState(0))
    given = np.array([[0.1, 0.2], [0.9, 0.8], [0.5, 0.5]])
    text = "There are 3 " + writer.points([(1, given)], "dogs") + ". 12 more </b>"
    answer = read(tokenizer, style, places, text, writer.taken())
    assert answer.startswith('There are 3 <points coords="1 1 ')
    assert answer.endswith('">dogs</points>. 12 more </b>')
    found = extract_points(answer, 1, 1)
    assert [p.id for p in found] == [1, 2, 3]
    near = sorted((p.x, p.y) for p in found)
    np.testing.assert_allclose(near, sorted(map(tuple, given.tolist())), atol=0.1)
    assert [(tag.label, len(tag.points)) for tag in complete_tags(answer)] == [("dogs", 3)]


def test_points_of_images_and_frames(tokenizer: Tokenizer) -> None:
    style = PointStyle()
    images = PointPlaces.of_images([(80, 60), (60, 60)], SETTINGS)
    writer = PointWriter(style, images, np.random.RandomState(0))
    text = writer.points([(1, np.array([[0.1, 0.1]])), (2, np.array([[0.2, 0.2], [0.9, 0.9]]))], "cars")
    points = extract_points(read(tokenizer, style, images, text, writer.taken()), 1, 1)
    assert [(p.block, p.id) for p in points] == [(1, 1), (2, 2), (2, 3)]
    frames = PointPlaces.of_frames([0.0, 0.5, 1.0], SETTINGS, (3, 3))
    writer = PointWriter(style, frames, np.random.RandomState(0))
    tracks = [(0.0, {"b": np.array([0.1, 0.1]), "a": None}), (1.0, {"b": np.array([0.8, 0.8]), "a": np.array([0.2, 0.9])})]
    text = writer.tracks(tracks, "bird")
    answer = read(tokenizer, style, frames, text, writer.taken())
    assert answer.endswith('">bird</tracks>')
    assert sorted((p.block, p.id) for p in extract_points(answer, 1, 1)) == [(0.0, 1), (1.0, 1), (1.0, 2)]


def test_points_that_are_nowhere_are_left_out(tokenizer: Tokenizer) -> None:
    """The published code can choose a patch that a token does not have."""
    frames = PointPlaces.of_frames([0.0], SETTINGS, (3, 3))
    writer = PointWriter(PointStyle(), frames, np.random.RandomState(0))
    text = writer.points([(0.0, np.array([[0.1, 0.1], [0.6, 0.6]]))], "x")
    rows = writer.taken()
    assert rows is not None
    rows[0, 1] = int((frames.pooled_idx[rows[0, 0]] < 0).argmax())
    points = extract_points(read(tokenizer, PointStyle(), frames, text, rows), 1, 1)
    assert [p.id for p in points] == [2]


def test_text_stays_as_it_is(tokenizer: Tokenizer) -> None:
    places = PointPlaces.of_images([(80, 60)], SETTINGS)
    for text in ("There are none.", "1 2 3", "a < b </", 'coords="1 2', "", "</point> 12"):
        tokens = tokenizer.encode(text)
        expected = text.replace("</point>", "</points>")
        assert tokenizer.decode(read_points(PointTextReader(tokenizer, places), tokens, [])) == expected


def test_an_answer_that_was_cut(tokenizer: Tokenizer) -> None:
    places = PointPlaces.of_images([(80, 60)], SETTINGS)
    writer = PointWriter(PointStyle(), places, np.random.RandomState(0))
    text = writer.points([(1, np.array([[0.1, 0.2], [0.9, 0.8]]))], "dogs")
    tokens, chosen = generated(tokenizer, text, writer.taken())
    for length in range(len(tokens)):
        answer = tokenizer.decode(read_points(PointTextReader(tokenizer, places), tokens[:length], chosen[:length]))
        assert len(extract_points(answer, 1, 1)) <= 2
    cut = tokens.index(tokenizer.point_token_ids[2]) + 2  # behind the first number
    assert len(extract_points(tokenizer.decode(read_points(PointTextReader(tokenizer, places), tokens[:cut], chosen[:cut])), 1, 1)) == 1
