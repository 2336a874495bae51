"""Composed scenes: what is drawn is what is asked, and nothing depends on anything but seed, split and number."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from molmo_core.config import ConfigError
from pipelines.data.config import ScenesConfig
from pipelines.data.preparation.emoji import drawings, records, scenes
from pipelines.data.preparation.emoji.drawings import ARTISTS, KINDS, UNSEEN, Drawings, plural
from pipelines.data.preparation.emoji.scenes import FPS, SECONDS, Painter, Scene

SIZE = 64


class Without:
    """Draws everything but one kind."""

    def __init__(self, kind, draw):
        self.kind, self.draw = kind, draw

    def __call__(self, pixels, thing):
        if thing.kind != self.kind:
            self.draw(pixels, thing)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawings")


@pytest.fixture(scope="module")
def painter(folder):
    return Painter(Drawings(folder), SIZE)


def test_every_artist_drew_every_kind(painter):
    seen = {}
    for artist in ARTISTS:
        for kind in KINDS:
            pixels = painter.drawings.pixels(artist, kind, 32)
            assert (pixels[..., 3] > 128).mean() > 0.1, (artist, kind)
            seen[pixels.tobytes()] = (artist, kind)
    assert len(seen) == len(ARTISTS) * len(KINDS), "two drawings are the same"


def test_things_are_where_the_truth_says(painter):
    """Without the things, the picture differs around their centres and nowhere else."""
    for number in range(40):
        scene = painter.scene(np.random.default_rng(number), unseen=number % 2 == 1)
        pixels = scene.pixels
        assert pixels.shape == (SIZE, SIZE, 3)
        assert pixels.dtype == np.uint8
        assert 1 <= len(scene.things) <= scenes.MOST
        assert len({(thing.kind, thing.artist) for thing in scene.things}) == 1
        assert (scene.things[0].artist == UNSEEN) == (number % 2 == 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Painter, "_draw", lambda *_: None)
            empty = painter.scene(np.random.default_rng(number), unseen=number % 2 == 1).pixels
        changed = np.argwhere((pixels != empty).any(-1))
        for thing in scene.things:
            near = np.abs(changed - (thing.y, thing.x)).max(-1) <= thing.side / 2 + 1
            assert near.sum() > 0.15 * thing.side**2
            changed = changed[~near]
        assert len(changed) == 0


def test_questions_agree_with_the_scene(painter):
    for number in range(20):
        rng = np.random.default_rng(number)
        scene = painter.scene(rng, unseen=False)
        naming, counting, pointing, there = records.about_scene(scene, rng)
        kind = scene.things[0].kind
        assert naming["answer"] == kind
        assert counting["answer"] == str(len(scene.things))
        assert plural(kind) in counting["question"]
        assert pointing["question"] == f"Point to the {plural(kind)}."
        assert pointing["points"] == [[round(100 * t.x / SIZE, 1), round(100 * t.y / SIZE, 1)] for t in scene.things]
        assert (there["answer"] == "yes") == (there["question"] == f"Are there any {plural(kind)}?")


def test_clips_show_what_they_say(painter):
    events = set()
    for number in range(12):
        clip = painter.clip(np.random.default_rng(number), unseen=False)
        events.add(clip.event)
        assert clip.frames.shape == (FPS * SECONDS, SIZE, SIZE, 3)
        if clip.event == "appear":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(painter, "_draw", Without(clip.kind, painter._draw))
                without = painter.clip(np.random.default_rng(number), unseen=False)
            there = (clip.frames != without.frames).any((1, 2, 3))
            assert there.tolist() == [i >= clip.truth * FPS for i in range(FPS * SECONDS)]
        else:
            assert 0 <= clip.truth <= 3
            # The line is hidden, for a moment, by those that cross it only.
            line = (clip.frames[:, :, SIZE // 2] == (255, 0, 0)).all(-1)
            rows = np.linspace(int(scenes.SIDES[0] * SIZE), SIZE - int(scenes.SIDES[0] * SIZE), 3).round().astype(int)
            assert sum(not line[:, row].all() for row in rows) == clip.truth
    assert events == {"appear", "cross"}


def test_a_varied_scene_shows_its_things_where_it_says(painter):
    """Mirrored, a scene's things are at mirrored places; of a scene of one colour and one thing, the thing is what differs."""
    sides = set()
    for number in range(12):
        scene = painter.scene(np.random.default_rng(number), unseen=False)
        plain = np.full_like(scene.pixels, 200)
        x, y = (round(value) for value in (scene.things[0].x, scene.things[0].y))
        plain[y - 2 : y + 2, x - 2 : x + 2] = 0
        other = scenes.varied(Scene(plain, scene.things), np.random.default_rng(number))
        darkest = np.argwhere(other.pixels.sum(-1) == other.pixels.sum(-1).min()).mean(0) + 0.5
        assert np.abs(darkest - (other.things[0].y, other.things[0].x)).max() < 1
        sides.add(other.things[0].x == scene.things[0].x)
    assert sides == {True, False}


def test_records_are_the_same_whoever_writes_them_and_however_many(tmp_path, folder):
    few, more = (ScenesConfig(size=SIZE, train=count, test=2, clips=0.5, drawings=str(folder)) for count in (3, 6))
    records.write(tmp_path / "few", few, seed=1)
    records.write(tmp_path / "more", more, seed=1)
    lines = {name: (tmp_path / name / "train.jsonl").read_text().splitlines() for name in ("few", "more")}
    assert lines["few"] == lines["more"][:3]
    media = [json.loads(line) for line in lines["more"]]
    assert {"image", "video"} <= {key for record in media for key in record}
    for record in media[:3]:
        path = record.get("image") or record["video"]
        assert (tmp_path / "few" / path).read_bytes() == (tmp_path / "more" / path).read_bytes()
    clip = next(record["video"] for record in media if "video" in record)
    with av.open(str(tmp_path / "more" / clip)) as container:
        assert sum(1 for _ in container.decode(video=0)) == FPS * SECONDS
    picture = next(record["image"] for record in media if "image" in record)
    assert Image.open(tmp_path / "more" / picture).size == (SIZE, SIZE)
    unseen = [json.loads(line) for line in (tmp_path / "more" / "unseen.jsonl").read_text().splitlines()]
    assert {record["metadata"]["artist"] for record in unseen if "image" in record} <= {UNSEEN}


def test_another_package_is_refused(tmp_path, monkeypatch):
    wrong = ARTISTS["emojione"]._replace(sha256="0" * 64)
    monkeypatch.setattr(drawings, "ARTISTS", {"emojione": wrong})
    with pytest.raises(ConfigError, match="is not the published package"):
        Drawings(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"install Node\.js"):
        Drawings(tmp_path)
