"""The inspection page: drawn from the arrays alone, complete in itself, and it works in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from molmo_core.models.base import BaseModelConfig
from molmo_core.preprocessing.packing import pack
from pipelines.data.inspection import Inspector, _content
from pipelines.data.inspection_rows import attention_mask

TREE = [
    {"style": "demo", "question": "Point to the dogs.", "answer": '<point x="25.0" y="75.0" alt="dogs">dogs</point>'},
    {"style": "demo", "question": "How many cups are on the table?", "answer": "3"},
]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module", params=["molmo-qwen2-siglip-bidir", "molmo-qwen2-clip"])
def made(request, golden):
    """(model, inspector, a packed row of an image with a message tree and a text)."""
    model = BaseModelConfig.load(golden / request.param / "config.yaml")
    preprocessor = model.build_preprocessor(for_inference=False, max_seq_len=2048)
    image = np.random.RandomState(0).randint(0, 256, (90, 260, 3), np.uint8)
    rows = [
        preprocessor({"image": image, "message_list": TREE}, rng=np.random.RandomState(0)),
        preprocessor({"style": "demo", "question": "a b c", "answer": "yes <no> & no"}, rng=np.random.RandomState(0)),
    ]
    inspector = Inspector(model.build_tokenizer(), preprocessor.settings, lambda *arrays: attention_mask(model, *arrays))
    return model, inspector, rows


class Balance(HTMLParser):
    """Checks that every element is closed."""

    VOID = frozenset({"meta", "input", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open[-1] != tag and self.open[-1] in ("html",):
            self.open.pop()
        assert self.open.pop() == tag


def test_everything_is_on_the_page(made):
    model, inspector, rows = made
    page = inspector.page([pack(rows)], "test <1>")
    parser = Balance()
    parser.feed(page)
    assert set(parser.open) <= {"html"}
    crops, pooled = len(rows[0]["images"]), len(rows[0]["pooled_patches_idx"])
    assert page.count("<image ") == crops
    assert page.count('class="pooled_patches_idx"') == pooled
    assert page.count('<rect class="crop ') == crops - 1
    assert page.count('<circle class="point"') == 1
    weights = np.concatenate([r["loss_masks"] for r in rows])
    assert len(re.findall(r'class="t(?: special)? loss"', page)) == (weights > 0).sum(), "every token with loss is coloured, once"
    assert page.count('<div class="segment') == 3 + 1
    assert "test &lt;1&gt;" in page
    assert "http" not in re.sub(r"<title>.*?</title>", "", page), "nothing is fetched"
    assert model.build_tokenizer().decode(rows[1]["input_ids"]).count("yes") == 1


def test_point_is_where_the_answer_says(made):
    _, inspector, rows = made
    x, y = map(float, re.search(r'class="point" cx="([\d.]+)" cy="([\d.]+)"', inspector.pictures(rows[0])).groups())
    height, width = inspector.settings.crop_size
    if inspector.settings.resize_mode == "default":  # padded above and below: 90 of 260
        assert (x / width, y / height) == pytest.approx((0.25, 0.5 + 0.25 * 90 / 260), abs=0.03)
    else:
        assert (x / width, y / height) == pytest.approx((0.25, 0.75), abs=0.01)


def test_points_lie_on_their_own_image_or_frame(golden):
    """Each point is on the whole crop of its image, or on the frame of its time; what a question says is not drawn."""
    model = BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir" / "config.yaml", ["data_formatter.pointing_format=html-v2"])
    preprocessor = model.build_preprocessor(for_inference=False, max_seq_len=2048)
    inspector = Inspector(model.build_tokenizer(), preprocessor.settings, lambda *arrays: attention_mask(model, *arrays))
    images = [np.random.RandomState(i).randint(0, 256, (200, 300 + i, 3), np.uint8) for i in range(2)]
    record = {"style": "demo", "question": "What is at (20, 30)?", "answer": '<points coords="1 1 250 750;2 2 500 500">cats</points>'}
    row = preprocessor({"images": images, **record}, rng=np.random.RandomState(0))
    points = inspector._points(row, None)
    whole = inspector._whole_crops(row)
    assert len(whole) == 2
    assert whole[1] > 1
    assert {crop: [(p.x, p.y) for p in found] for crop, found in points.items()} == {0: [(250, 750)], whole[1]: [(500, 500)]}
    frames = inspector._points({**row, "labels": row["labels"]}, [0.0, 1.1, 2.0])  # the same answer read as times
    assert {crop: len(found) for crop, found in frames.items()} == {1: 1, 2: 1}


def test_pixels_come_back(made):
    _, inspector, rows = made
    crop = inspector._pixels(rows[0]["images"][0])
    patch = inspector.settings.patch_size
    first = rows[0]["images"][0][1].reshape(patch, patch, 3)
    np.testing.assert_array_equal(crop[:patch, patch : 2 * patch], first)


def test_content_of_a_padded_crop():
    mask = np.zeros((4, 8))
    mask[1:3, :] = 1
    mask[3, :] = 0.5
    assert _content(mask.reshape(-1), (4, 8)) == pytest.approx((0.25, 0.0, 0.875, 1.0))


def test_mask_separates_what_is_packed(made):
    model, _, rows = made
    row = pack(rows)
    allowed = attention_mask(model, row["input_ids"], row["subsegment_ids"], row["loss_masks"])
    first = len(rows[0]["input_ids"])
    assert not allowed[first:, :first].any()
    assert not allowed[:first, first:].any()
    assert allowed.diagonal().all()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser(made, tmp_path):
    """Headless Chromium draws it: the crop's pixels, the point and the mask are to be seen."""
    _, inspector, rows = made
    (tmp_path / "page.html").write_text(inspector.page([pack(rows)], "test"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--window-size=1240,2400",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    shot = tmp_path / "shot.png"
    command = [BROWSER, *flags, f"--screenshot={shot}", f"file://{tmp_path / 'page.html'}"]
    subprocess.run(command, check=True, timeout=240, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    pink = (np.abs(pixels - (255, 45, 120)).sum(-1) < 90).sum()
    blue = (np.abs(pixels - (59, 110, 165)).sum(-1) < 30).sum()
    green = ((pixels[..., 1] > pixels[..., 0] + 30) & (pixels[..., 1] > pixels[..., 2] + 30)).sum()
    assert pink > 20, "the point"
    assert blue > 2000, "the mask"
    assert green > 500, "tokens with loss"
    dom = subprocess.run(
        [BROWSER, *flags, "--dump-dom", f"file://{tmp_path / 'page.html'}"], check=True, timeout=240, capture_output=True, text=True
    )
    assert dom.stdout.count("<image ") == len(rows[0]["images"])
