"""Every record that docs/data.md shows becomes an example, and every file that it shows how to write is read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from molmo_core.models.base import BaseModelConfig
from pipelines.data.builder import ExampleBuilder, example_rng
from pipelines.data.preparation.train_tokenizer import train_tokenizer
from pipelines.data.sources import open_records

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/data.md").read_text()
HOST = "https://example.org/"


def blocks(language: str) -> list[str]:
    records = PAGE[PAGE.index("## Records") : PAGE.index("## A preparation")]
    return re.findall(rf"^```{language}\n(.*?)^```", records, re.MULTILINE | re.DOTALL)


def rows(block: str) -> list[dict]:
    """The objects of a block, each of one or several lines."""
    found, decoder = [], json.JSONDecoder()
    while block := block.strip():
        row, end = decoder.raw_decode(block)
        found.append(row)
        block = block[end:]
    return found


ROWS = [row for block in blocks("json") for row in rows(block)]


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["What is this? A cat. Noise number 0123456789."], 300, folder)

    def load(name: str) -> ExampleBuilder:
        model = BaseModelConfig.load(ROOT / f"configs/models/{name}.yaml", overrides=[f"llm.tokenizer.identifier={folder}"])
        return ExampleBuilder(model.build_preprocessor(for_inference=False, max_seq_len=2048), 1_000_000)

    return {name: load(name) for name in ("demo", "molmo2-4b", "molmo-point-8b")}


@pytest.fixture
def folder(tmp_path, make, golden):
    """A folder with all media of the page."""
    for name in set(re.findall(r'"([^"\s]+\.(?:jpg|mp4))"', "".join(blocks("json") + blocks("python")))):
        path = tmp_path / name.removeprefix(HOST)
        path.parent.mkdir(exist_ok=True)
        shutil.copy(golden / "video-olmo/video.mp4", path) if path.suffix == ".mp4" else make.picture(path)
    return tmp_path


def check(builder, path):
    records = open_records(str(path))
    for i in range(len(records)):
        example = builder(records[i], example_rng(0, 0, 0, i))
        assert (example["loss_masks"] > 0).any()
    return len(records)


@pytest.mark.parametrize("row", ROWS, ids=[json.dumps(row)[:60] for row in ROWS])
def test_record(row, builders, folder):
    local = json.loads(json.dumps(row).replace(HOST, f"{folder}/"))
    path = folder / "records.jsonl"
    path.write_text(json.dumps(local) + "\n")
    assert check(builders["molmo2-4b"], path) == check(builders["molmo-point-8b"], path) == 1
    if "video" not in row:
        assert check(builders["demo"], path) == 1


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: re.findall(r"(?:import|from) (\w+)", code)[0])
def test_file(code, builders, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    exec(code, {})
    (written,) = set(folder.iterdir()) - before
    (folder / "cat.jpg").unlink()  # the pixels are in the file
    assert check(builders["molmo2-4b"], written) == 1


def test_the_page_has_all_forms():
    assert len(ROWS) > 15
    assert len(blocks("python")) == 3
