"""The page at `/`: a few static files (`page/`) and what they need to know of this server. No build step, nothing from elsewhere.

The driver reads everything once, so a missing example is told at the start, and frontends on other nodes need no files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from molmo_core.config import ConfigError, MissingFile
from pipelines.serving.config import Example, ServeConfig

_STATIC = Path(__file__).with_name("page")
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}
_MAX_EXAMPLE_BYTES = 8 << 20
_SCENE = str(_STATIC / "scene.svg")
_USUAL_EXAMPLES = [
    Example("Describe this picture.", _SCENE),
    Example("Point to the trees.", _SCENE),
    Example("How many windows does the house have?", _SCENE),
    Example("What is the weather like?", _SCENE),
]

HEADERS = {
    # Nothing but this server's own files runs or is asked; pictures and videos that the user chose are blobs.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Of every answer that is a part of the page."""


@dataclasses.dataclass(frozen=True)
class PageFile:
    media_type: str
    content: bytes


def page_files(config: ServeConfig) -> dict[str, PageFile]:
    """The page's files by name; `index.html` is the page, `page.json` what it knows of the server.

    Raises:
        ConfigError: an example's file is missing, too large, or of a kind that browsers do not show.
    """
    files = {path.name: _read(path) for path in sorted(_STATIC.iterdir()) if path.suffix in _MEDIA_TYPES}
    examples = []
    names: dict[str, str] = {}
    for example in config.examples or _USUAL_EXAMPLES:
        shown = {"question": example.question}
        if example.file:
            path = Path(example.file)
            if example.file not in names:
                names[example.file] = path.name if path.parent == _STATIC else f"example-{len(names)}{path.suffix.lower()}"
                files[names[example.file]] = _read_example(path)
            shown |= {"file": names[example.file], "name": path.name}
        examples.append(shown)
    facts = {"max_tokens": config.max_new_tokens, "max_body_bytes": config.max_body_bytes, "multi_turn": config.multi_turn}
    files["page.json"] = PageFile(_MEDIA_TYPES[".json"], json.dumps({**facts, "examples": examples}).encode())
    return files


def _read(path: Path) -> PageFile:
    return PageFile(_MEDIA_TYPES[path.suffix.lower()], path.read_bytes())


def _read_example(path: Path) -> PageFile:
    if not path.is_file():
        raise MissingFile(f"serve: the example {path} does not exist", str(path))
    media_type = _MEDIA_TYPES.get(path.suffix.lower(), "")
    if not media_type.startswith(("image/", "video/")):
        known = ", ".join(suffix for suffix, kind in _MEDIA_TYPES.items() if kind.startswith(("image/", "video/")))
        raise ConfigError(f"serve: the example {path} is none of {known}")
    if (size := path.stat().st_size) > _MAX_EXAMPLE_BYTES:
        raise ConfigError(f"serve: the example {path} has {size:,} bytes; at most {_MAX_EXAMPLE_BYTES:,} are shown on the page")
    return _read(path)
