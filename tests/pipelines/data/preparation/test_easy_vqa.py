"""The records made from the easy-vqa package."""

import collections

import numpy as np
import pytest
from PIL import Image

from pipelines.data.preparation import easy_vqa


@pytest.fixture(scope="module")
def official_test():
    """All questions of the split, which are counted here; where the figures are takes longest to find, and is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(easy_vqa, "centre", lambda pixels: (50.0, 50.0))
        return easy_vqa.records("test")


def test_official_split(official_test):
    kinds = collections.Counter(a["type"] for r in official_test for a in r["message_list"])
    assert len(official_test) == 1000
    assert kinds == {"yes_no": 7136, "colour": 1280, "shape": 1257, "pointing": 1000}
    assert all("".join(a["answer"]) for r in official_test for a in r["message_list"])


def test_figures_agree_with_the_questions(official_test):
    """Where no question asks for the shape, the figure is inferred from the others: never wrongly."""
    checked = 0
    for record in official_test:
        pairs = [(a["question"], a["answer"]) for a in record["message_list"] if a["type"] != "pointing"]
        truth = {answer for _, answer in pairs if answer in easy_vqa.SHAPES}
        inferred = easy_vqa._figure([p for p in pairs if p[1] not in easy_vqa.SHAPES])
        if truth and inferred != "shape":
            assert {inferred} == truth
            checked += 1
    assert checked > 500


def test_point_lies_on_the_figure():
    for record in easy_vqa.records("test", 100):
        pixels = np.asarray(Image.open(record["image"]).convert("RGB")).astype(int)
        x, y = record["metadata"]["point"]
        height, width = pixels.shape[:2]
        inside = pixels[int(y / 100 * height), int(x / 100 * width)]
        assert np.abs(inside - pixels[0, 0]).sum() > 60, record["image"]
        answer = record["message_list"][-1]["answer"]
        assert answer.startswith(f'<point x="{round(x)}" y="{round(y)}" alt="')


def test_training_records_share_out_the_questions(monkeypatch):
    monkeypatch.setattr(easy_vqa, "centre", lambda pixels: (50.0, 50.0))
    records = easy_vqa.records("train")
    kinds = collections.Counter(a["type"] for r in records for a in r["message_list"])
    assert kinds == {"yes_no": 28407, "colour": 5166, "shape": 5002, "pointing": len(records)}
    assert len({r["image"] for r in records}) == 4000
    assert max(len(r["message_list"]) for r in records) == easy_vqa.TRAIN_QUESTIONS + 1


def test_centre_of_a_known_figure():
    pixels = np.full((40, 50, 3), 230, np.uint8)
    pixels[10:20, 30:50] = (0, 0, 255)
    pixels[:, 48:] = 230
    assert easy_vqa.centre(pixels) == (round(100 * 39 / 50, 1), round(100 * 15 / 40, 1))
