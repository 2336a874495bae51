"""The report's page: which examples it shows, confusions, and that it is complete in itself and safe."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.data.sources import open_records
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.confusion import Confusion
from pipelines.evaluation.examples import sample, worst
from pipelines.evaluation.report import write_report
from pipelines.evaluation.results import Results, encode

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
COLOURS = ("red", "green", "blue")


def test_the_worst_take_turns_and_none_is_right():
    kinds = np.array([0] * 60 + [1] * 4 + [2] * 2)
    scores = np.array([0.0] * 50 + [1.0] * 10 + [0, 0, 0.5, 1] + [0.25, 0.25])
    chosen = worst(kinds, scores, 8)
    assert scores[chosen].tolist() == [0] * 8
    assert kinds[chosen].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert worst(kinds, scores, 8).tolist() == chosen.tolist()
    everything = worst(kinds, scores, 100)
    assert sorted(everything.tolist()) == np.flatnonzero(scores < 1).tolist()
    assert sorted(scores[everything].tolist()) == scores[everything].tolist()
    assert worst(kinds, np.ones(66), 8).tolist() == []


def test_a_sample_is_spread_and_the_same_each_time():
    chosen = sample(1000, 50)
    assert chosen.tolist() == sorted(set(chosen.tolist())) == sample(1000, 50).tolist()
    assert chosen[0] < 100
    assert chosen[-1] > 900
    assert sample(3, 50).tolist() == [0, 1, 2]


def test_confusion_of_few_answers():
    counts = Confusion()
    for truth, given, times in (("yes", "Yes.", 6), ("yes", "no", 1), ("no", "no", 4), ("no", "a zebra", 2)):
        for _ in range(times):
            counts.add("q", "vqa_score", [truth], given)
    for n in range(40):
        counts.add("names", "exact_match", [str(n)], "x")
        counts.add("pointing", "pointing", ["a"], "b")
        counts.add("votes", "vqa_score", ["a", "b"], "b")
        counts.add("how many", "count", [str(n % 3)], f"a total of {n % 2}")
    assert counts.tables() == {
        "how many": {"answers": ["0", "1", "2"], "counts": [[7, 7, 0, 0], [6, 7, 0, 0], [7, 6, 0, 0]]},
        "q": {"answers": ["yes", "no"], "counts": [[6, 1, 0], [0, 4, 2]]},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished evaluation: colours, some of them wrong, points, a text that is not HTML, an image that is gone, a rejected record."""
    folder = tmp_path_factory.mktemp("evaluation")
    records, rows, random = [], [], np.random.RandomState(0)
    for i in range(40):
        colour = COLOURS[i % 3]
        Image.new("RGB", (80, 60), colour).save(folder / f"{i}.png")
        records.append({"image": f"{i}.png", "question": "which colour?", "answer": colour})
        given = COLOURS[random.randint(3)] if i % 4 == 0 else colour
        known = {"record": i, "source": "records.jsonl", "row": i}
        if i == 39:
            rows.append(known | {"rejected": "image: undecodable", "detail": "no image"})
            continue
        shown = {"type": "colour", "question": "which colour?", "answers": [colour], "metric": "exact_match", "prediction": given}
        rows.append(known | shown | {"number": 0, "score": float(given == colour), "scores": [("exact_match", float(given == colour))]})
        if i % 5 == 0:
            points = {"true_points": [{"x": 0.25, "y": 0.5}], "answer_points": [{"x": 0.75, "y": 0.5}]}
            shown = {
                "type": "pointing",
                "question": "point",
                "answers": ["1"],
                "metric": "pointing",
                "prediction": "<script>alert(1)</script>",
            }
            rows.append(known | shown | points | {"number": 1, "score": 0.0, "scores": [("f1", 0.0), ("precision", 0.0)]})
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "10.png").unlink()
    results = Results(folder, 40, 40)
    results.commit(0, encode(rows))
    config = EvaluateConfig(model="m & m", records=str(folder / "records.jsonl"), output=str(folder), examples=30)
    write_report(config, results, open_records(config.records), 1.0)
    return folder


def test_the_page_is_complete_and_safe(folder):
    page = (folder / "report.html").read_text()
    assert "m &amp; m" in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,)', page), "nothing is fetched"
    assert "1 × image: undecodable" in page
    assert page.count('class="card"') == 30 + _wrong(folder)
    assert "not shown: media: missing file" in page


def _wrong(folder) -> int:
    scores = [row["score"] for row in Results(folder, 40, 40).read(0).to_pylist() if row["number"] is not None]
    return min(30, sum(score < 1 for score in scores))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser(folder):
    """Points lie where they should, the filter hides other types, and nothing is wider than the window."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 900, "height": 700})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"file://{folder / 'report.html'}")
        card = page.locator(".card[data-type=pointing]:has(figure)").first
        picture, cross = card.locator("img").bounding_box(), card.locator("path.answer").first.bounding_box()
        assert (cross["x"] + cross["width"] / 2 - picture["x"]) / picture["width"] == pytest.approx(0.75, abs=0.01)
        assert (cross["y"] + cross["height"] / 2 - picture["y"]) / picture["height"] == pytest.approx(0.5, abs=0.01)
        page.locator("select").select_option("pointing")
        playwright.expect(page.locator(".card[data-type=colour]:visible")).to_have_count(0)
        assert page.locator(".card:visible").count() > 5
        page.set_viewport_size({"width": 420, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        assert problems == []
        browser.close()
