"""The page's files, without a server: complete, of known kinds, and free of everything that its own rules forbid."""

import json
import re
from pathlib import Path

import pytest

from molmo_core.config import ConfigError, MissingFile
from pipelines.serving.config import Example, ServeConfig
from pipelines.serving.playground import HEADERS, page_files

ROOT = Path(__file__).parent.parent.parent.parent


def texts(suffix: str) -> dict[str, str]:
    files = page_files(ServeConfig(model="m"))
    return {name: file.content.decode() for name, file in files.items() if name.endswith(suffix)}


def test_what_the_page_names_is_there():
    files = page_files(ServeConfig(model="m"))
    named = re.findall(r'(?:src|href)="page/([\w.-]+)"', files["index.html"].content.decode())
    for module in texts(".js").values():
        named += re.findall(r'from "\./([\w.-]+)"', module)
    assert {"app.js", "style.css", "points.js"} <= set(named) <= set(files)
    used = {name for module in texts(".js").values() for name in re.findall(r'\$\("([\w-]+)"\)', module)}
    assert used <= set(re.findall(r'\bid="([\w-]+)"', files["index.html"].content.decode()))


def test_nothing_inline_and_nothing_from_elsewhere():
    """What the Content-Security-Policy would stop in the browser is not written."""
    assert "'unsafe" not in HEADERS["Content-Security-Policy"]
    (page,) = texts(".html").values()
    assert not re.search(r"<script>|<style>|\son\w+=|\sstyle=", page)
    for text in [page, *texts(".js").values(), *texts(".css").values()]:
        assert not re.search(r"https?://|innerHTML|\beval\(", text.replace("http://www.w3.org/2000/svg", ""))


def test_facts_and_examples(tmp_path):
    picture = tmp_path / "a picture.PNG"
    picture.write_bytes(b"p")
    examples = [Example("what?", str(picture)), Example("and this?", str(picture)), Example("hello")]
    files = page_files(ServeConfig(model="m", max_new_tokens=7, examples=examples))
    facts = json.loads(files["page.json"].content)
    assert facts["max_tokens"] == 7
    assert facts["examples"] == [
        {"question": "what?", "file": "example-0.png", "name": "a picture.PNG"},
        {"question": "and this?", "file": "example-0.png", "name": "a picture.PNG"},
        {"question": "hello"},
    ]
    assert (files["example-0.png"].media_type, files["example-0.png"].content) == ("image/png", b"p")


def test_examples_that_cannot_be_shown(tmp_path):
    with pytest.raises(MissingFile, match=r"nothing\.png does not exist"):
        page_files(ServeConfig(model="m", examples=[Example("?", str(tmp_path / "nothing.png"))]))
    (tmp_path / "page.html").write_text("<p>")
    with pytest.raises(ConfigError, match=r"page\.html is none of \.svg, \.png"):
        page_files(ServeConfig(model="m", examples=[Example("?", str(tmp_path / "page.html"))]))
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(9 << 20)
    with pytest.raises(ConfigError, match="at most 8,388,608"):
        page_files(ServeConfig(model="m", examples=[Example("?", str(tmp_path / "large.png"))]))


def test_the_demo_has_its_own_drawings():
    config = ServeConfig.load(ROOT / "configs/serve/demo.yaml")
    facts = json.loads(page_files(config)["page.json"].content)
    assert facts["examples"][0]["name"] == "red-circle.svg"
    assert not facts["multi_turn"]
