"""Pictures and clips composed of drawings on photographs: what is where, and when, is known exactly."""

from __future__ import annotations

import importlib.metadata
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from molmo_core.config import ConfigError
from pipelines.data.preparation.emoji.drawings import ARTISTS, KINDS, UNSEEN, Drawings

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "brick.png", "grass.png", "gravel.png", "motorcycle_left.png")
MOST = 4
"""Things of a picture."""
SIDES = (0.22, 0.30)
"""Side of a thing, as a share of the picture's."""
TILT = 15
"""Degrees to either side."""
FPS, SECONDS = 2, 6
"""Of a clip."""
MIXED, CONTRAST, LIGHT = 0.12, (0.7, 1.2), 25
"""Of `varied`: standard deviation of the weights with which colours are mixed, the range of contrasts, and how much lighter or darker."""


class Thing(NamedTuple):
    """A drawing in a picture: its centre and side in pixels."""

    kind: str
    artist: str
    x: float
    y: float
    side: int


class Scene(NamedTuple):
    """A picture with one to four things of one kind."""

    pixels: np.ndarray
    """[size, size, 3] uint8."""
    things: list[Thing]


class Clip(NamedTuple):
    """Moving things, and what happens."""

    frames: np.ndarray
    """[FPS * SECONDS, size, size, 3] uint8."""
    kind: str
    event: str
    """`appear`: a thing of this kind comes in. `cross`: some of this kind cross the line in the middle."""
    truth: int
    """Full seconds until it appears; how many cross."""


class Painter:
    """Composes scenes of one size.

    Args:
        drawings: of all artists.
        size: width and height of the pictures in pixels, even.

    Raises:
        ConfigError: scikit-image, whose photographs are the backgrounds, is not installed.
    """

    def __init__(self, drawings: Drawings, size: int):
        self.drawings, self.size = drawings, size
        self.photographs = _photographs()

    def scene(self, rng: np.random.Generator, unseen: bool) -> Scene:
        """A picture; `unseen`: by the artist that no training scene shows."""
        kind, artist = self._kind(rng), self._artist(rng, unseen)
        side = self._side(rng)
        places = self._places(rng, int(rng.integers(1, MOST + 1)), side)
        things = [Thing(kind, artist, x, y, side) for x, y in places]
        pixels = self._background(rng)
        for thing in things:
            self._draw(pixels, thing, float(rng.uniform(-TILT, TILT)))
        return Scene(pixels, things)

    def clip(self, rng: np.random.Generator, unseen: bool) -> Clip:
        """A clip in which a thing appears, or things cross a line."""
        return self._appear(rng, unseen) if rng.random() < 0.5 else self._cross(rng, unseen)

    def _appear(self, rng: np.random.Generator, unseen: bool) -> Clip:
        there, comes = (str(kind) for kind in rng.choice(KINDS, 2, replace=False))
        artist, side, second = self._artist(rng, unseen), self._side(rng), int(rng.integers(1, SECONDS))
        (x, y), (x2, y2) = self._places(rng, 2, side)
        drift = rng.uniform(-0.15, 0.15, 2) * side
        background, frames = self._background(rng), []
        for i in range(FPS * SECONDS):
            frame = background.copy()
            step = drift * np.sin(2 * np.pi * i / (FPS * SECONDS))
            self._draw(frame, Thing(there, artist, x + step[0], y + step[1], side))
            if i >= second * FPS:
                self._draw(frame, Thing(comes, artist, x2, y2, side))
            frames.append(frame)
        return Clip(np.stack(frames), comes, "appear", second)

    def _cross(self, rng: np.random.Generator, unseen: bool) -> Clip:
        kind, artist = self._kind(rng), self._artist(rng, unseen)
        side = int(SIDES[0] * self.size)
        rows = np.linspace(side, self.size - side, 3)
        count = int(rng.integers(0, 4))
        crossing = rng.permutation(np.arange(3) < count)
        background, frames = self._background(rng), []
        middle = self.size // 2
        background[:, middle - 1 : middle + 1] = (255, 0, 0)
        near, far, length = 0.6 * side, self.size - 0.6 * side, FPS * SECONDS - 1
        stays = middle - 0.8 * side  # those that do not cross turn round before they touch the line
        for i in range(FPS * SECONDS):
            frame = background.copy()
            for y, crosses in zip(rows, crossing):
                way = i / length
                x = near + way * (far - near) if crosses else near + (stays - near) * (1 - abs(2 * way - 1))
                self._draw(frame, Thing(kind, artist, x, float(y), side))
            frames.append(frame)
        return Clip(np.stack(frames), kind, "cross", count)

    def _kind(self, rng: np.random.Generator) -> str:
        return str(rng.choice(KINDS))

    def _artist(self, rng: np.random.Generator, unseen: bool) -> str:
        return UNSEEN if unseen else str(rng.choice([name for name in ARTISTS if name != UNSEEN]))

    def _side(self, rng: np.random.Generator) -> int:
        return int(rng.uniform(*SIDES) * self.size)

    def _places(self, rng: np.random.Generator, count: int, side: int) -> list[tuple[float, float]]:
        """(x, y) of centres whose drawings lie inside and do not overlap."""
        while True:  # four of the largest side fit well: this ends after a few drawings
            places = rng.uniform(0.5 * side, self.size - 0.5 * side, (count, 2))
            apart = (np.abs(a - b).max() >= side for a, b in itertools.combinations(places, 2))
            if all(apart):
                return [(float(x), float(y)) for x, y in places]

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """A piece of a photograph, paler than the things in front of it; or one colour."""
        if rng.random() < 0.3:
            return np.broadcast_to(rng.integers(128, 256, 3, dtype=np.uint8), (self.size, self.size, 3)).copy()
        photograph = self.photographs[int(rng.integers(len(self.photographs)))]
        side = int(rng.uniform(0.4, 1.0) * min(photograph.size))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
        piece = photograph.resize((self.size, self.size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        return (128 + np.asarray(piece) // 2).astype(np.uint8)

    def _draw(self, pixels: np.ndarray, thing: Thing, tilt: float = 0.0) -> None:
        """Draws a thing on [size, size, 3] pixels, in place."""
        drawing = Image.fromarray(self.drawings.pixels(thing.artist, thing.kind, thing.side))
        source = np.asarray(drawing.rotate(tilt, Image.Resampling.BICUBIC), np.uint16)
        left, top = round(thing.x - thing.side / 2), round(thing.y - thing.side / 2)
        rows = slice(max(0, top), min(self.size, top + thing.side))
        columns = slice(max(0, left), min(self.size, left + thing.side))
        source = source[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        alpha = source[..., 3:]
        target = pixels[rows, columns]
        target[:] = (source[..., :3] * alpha + target * (255 - alpha)) // 255


def varied(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene to train on as if there were more artists than there are: half of them mirrored, all in somewhat other colours."""
    pixels, mirrored = _varied(scene.pixels, rng)
    size = pixels.shape[1]
    return Scene(pixels, [thing._replace(x=size - thing.x) if mirrored else thing for thing in scene.things])


def varied_clip(clip: Clip, rng: np.random.Generator) -> Clip:
    """The same for a clip; all of its frames alike."""
    return clip._replace(frames=_varied(clip.frames, rng)[0])


def _varied(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """[..., size, size, 3] uint8, and whether it is mirrored."""
    mirrored = bool(rng.random() < 0.5)
    mix = np.eye(3) + rng.normal(0, MIXED, (3, 3))
    mix = mix / mix.sum(1, keepdims=True) * rng.uniform(*CONTRAST)
    light = 128 + rng.uniform(-LIGHT, LIGHT)
    pixels = (pixels.astype(np.float32) - 128) @ mix.T.astype(np.float32) + np.float32(light)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    return (np.ascontiguousarray(pixels[..., ::-1, :]) if mirrored else pixels), mirrored


def _photographs() -> list[Image.Image]:
    try:
        files: Any = importlib.metadata.files("scikit-image") or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "emoji-scenes needs scikit-image's photographs: pip install scikit-image==0.26.0 (or the project's [scenes] extra)"
        ) from None
    found = {file.name: Path(str(file.locate())) for file in files if file.parent.name == "data" and file.name in PHOTOGRAPHS}
    missing = [name for name in PHOTOGRAPHS if name not in found]
    if missing:
        raise ConfigError(f"the installed scikit-image lacks {', '.join(missing)}; install scikit-image==0.26.0 again")
    pictures = []
    for name in PHOTOGRAPHS:
        with Image.open(found[name]) as image:
            pictures.append(image.convert("RGB"))
    return pictures
