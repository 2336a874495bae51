"""The same things as drawn by different artists: emoji sets that npm packages carry (Iconify), rendered to pixels by resvg.

They are fetched when scenes are made, never kept in the project; each version is checked against its published digest.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from molmo_core.config import ConfigError
from pipelines.files import write_bytes

FETCH_TIMEOUT_S = 300


class Artist(NamedTuple):
    """One set of drawings."""

    package: str
    """Name and version for npm."""
    sha256: str
    """Of the package's archive."""


ARTISTS = {
    "noto": Artist("@iconify-json/noto@1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),  # Apache-2.0
    "twemoji": Artist("@iconify-json/twemoji@1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),  # CC-BY-4.0
    "emojione": Artist("@iconify-json/emojione@1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),  # CC-BY-4.0
    "fluent": Artist("@iconify-json/fluent-emoji-flat@1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),  # MIT
    "fxemoji": Artist("@iconify-json/fxemoji@1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),  # Apache-2.0
    "noto-v1": Artist("@iconify-json/noto-v1@1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),  # Apache-2.0
}
UNSEEN = "noto-v1"
"""The artist that no training scene shows: Google's emoji from before 2017 ("blobs"), drawn anew since then for `noto`."""
KINDS = (
    "banana", "lemon", "grapes", "strawberry", "pineapple", "mushroom", "hamburger", "doughnut", "elephant", "pig", "penguin", "frog",
    "octopus", "snail", "turtle", "fish", "airplane", "bicycle", "bus", "rocket", "sailboat", "balloon", "umbrella", "guitar",
)  # fmt: skip
"""What is drawn: names that every set has, objects that look unlike each other."""


def plural(kind: str) -> str:
    """The name of several: `buses`, `grapes`, `fish`."""
    if kind in ("grapes", "fish"):
        return kind
    return kind + ("es" if kind.endswith("s") else "s")


class Drawings:
    """All artists' drawings, fetched into a folder the first time.

    Args:
        folder: where the packages' drawings are kept.

    Raises:
        ConfigError: resvg_py or npm is not there, a package cannot be fetched or is not the published one.
    """

    def __init__(self, folder: Path):
        try:
            import resvg_py
        except ModuleNotFoundError:
            raise ConfigError("emoji-scenes needs resvg_py: pip install resvg_py==0.5.0 (or the project's [scenes] extra)") from None
        self._render = resvg_py.svg_to_bytes
        self._sets = {name: _icons(folder, name, artist) for name, artist in ARTISTS.items()}

    @functools.lru_cache(maxsize=4096)  # noqa: B019  # lives as long as a preparation
    def pixels(self, artist: str, kind: str, size: int) -> np.ndarray:
        """A drawing: [size, size, 4] uint8, not premultiplied."""
        icons = self._sets[artist]
        icon = icons["icons"][icons.get("aliases", {}).get(kind, {}).get("parent", kind)]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
        with Image.open(io.BytesIO(self._render(svg_string=svg, width=size, height=size, skip_system_fonts=True))) as image:
            pixels = np.asarray(image.convert("RGBA"))
        if pixels.shape != (size, size, 4):
            raise RuntimeError(f"{artist}'s {kind} came out as {pixels.shape}, not {size} x {size}")
        return pixels


def _icons(folder: Path, name: str, artist: Artist) -> dict[str, Any]:
    path = folder / f"{name}.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _fetch(artist))
    icons: dict[str, Any] = json.loads(path.read_bytes())
    return icons


def _fetch(artist: Artist) -> bytes:
    """The package's icons.json."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", artist.package, "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, cwd=folder)
        except FileNotFoundError:
            raise ConfigError("emoji-scenes fetches its drawings with npm, which is not installed: install Node.js") from None
        except subprocess.CalledProcessError as error:
            raise ConfigError(f"npm could not fetch {artist.package}: {(error.stderr or error.stdout).strip()[-300:]}") from None
        except subprocess.TimeoutExpired:
            raise ConfigError(f"npm did not fetch {artist.package} within {FETCH_TIMEOUT_S} s; try again") from None
        archives = list(Path(folder).glob("*.tgz"))
        if len(archives) != 1:
            raise ConfigError(f"npm fetched {len(archives)} archives for {artist.package}, not one")
        digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if digest != artist.sha256:
            raise ConfigError(f"{artist.package} is not the published package: its SHA-256 is {digest}, not {artist.sha256}")
        with tarfile.open(archives[0]) as archive:
            file = archive.extractfile("package/icons.json")
            if file is None:
                raise ConfigError(f"{artist.package} has no icons.json")
            return file.read()
