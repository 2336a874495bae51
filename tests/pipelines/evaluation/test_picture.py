"""The sheet of sample answers: images, frames of videos, and a reason where there is nothing to show."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.data.sources import open_records
from pipelines.evaluation.picture import COLUMNS, MARGIN, SIDE, draw_answers


@pytest.fixture
def sheet(tmp_path):
    """Draws the answers to one question about each of some records."""

    def draw(*rows):
        (tmp_path / "r.jsonl").write_text("".join(json.dumps({"question": "q", "answer": "a", **row}) + "\n" for row in rows))
        answer = {"question": "q", "type": "t", "answers": ["a"], "prediction": "a", "score": 1}
        answers = [{"record": i, **answer} for i in range(len(rows))]
        return np.asarray(draw_answers(answers, open_records(str(tmp_path / "r.jsonl"))))

    return draw


def cell(sheet, i):
    """Pixels of the square of answer `i`."""
    size = SIDE + 2 * MARGIN
    x = i % COLUMNS * size + MARGIN
    return sheet[MARGIN : MARGIN + SIDE, x : x + SIDE]


def test_an_image_fills_its_square(sheet, tmp_path):
    Image.new("RGB", (10, 10), (200, 30, 40)).save(tmp_path / "red.png")
    assert (cell(sheet({"image": "red.png"}), 0) == (200, 30, 40)).all()


def test_a_video_is_shown_as_four_frames(sheet, tmp_path, golden):
    shutil.copy(golden / "video-olmo" / "video.mp4", tmp_path / "clip.mp4")
    shown = cell(sheet({"video": "clip.mp4"}), 0)
    half = SIDE // 2
    quarters = [shown[y : y + half // 2, x : x + half // 2] for y in (0, half) for x in (0, half)]
    assert all((quarter.min(axis=-1) < 250).mean() > 0.5 for quarter in quarters), "each quarter holds a frame"
    assert len({quarter.tobytes() for quarter in quarters}) == 4, "frames of different times"


@pytest.mark.parametrize("damage", ["gone", "not media", "unreachable"])
def test_what_cannot_be_shown_costs_its_square_only(sheet, tmp_path, golden, damage):
    Image.new("RGB", (10, 10), (200, 30, 40)).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    bad = {
        "gone": [{"image": "nowhere.png"}, {"video": "nowhere.mp4"}],
        "not media": [{"image": "broken.png"}, {"video": "broken.mp4"}],
        "unreachable": [{"image": "http://127.0.0.1:9/a.png"}, {"images": ["http://127.0.0.1:9/a.png", "red.png"]}],
    }[damage]
    shown = sheet(*bad, {"image": "red.png"})
    assert (cell(shown, 2) == (200, 30, 40)).all()
    for i in range(2):
        text = cell(shown, i).min(axis=-1)
        assert 0.005 < (text < 200).mean() < 0.3, "a reason in grey on white"
