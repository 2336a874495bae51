"""Mistakes are told before Ray starts, in one or two lines that say what to do."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from jobs import cli

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def place(own_database, tmp_path, monkeypatch, tiny_checkpoint):
    """A folder with records, a model and a database of its own, in which Ray must not start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    Path("model").symlink_to(tiny_checkpoint)
    Path("records.jsonl").write_text(json.dumps({"messages": ["Hello?", "Yes."]}) + "\n")
    Path("file").write_text("")
    unfinished = Path("unfinished")
    unfinished.mkdir()
    (unfinished / "prepare.json").write_text("{}")
    return tmp_path


def molmo(verb: str, config: str, *changes: str) -> Any:
    return CliRunner().invoke(cli.app, [verb, str(ROOT / "configs" / config), *changes], prog_name="molmo")


TRAIN = ("train", "train/finetune.yaml", "precision=fp32", "steps=2", "data.datasets.mine.path=records.jsonl")
EVALUATE = ("evaluate", "evaluate/own.yaml", "model=model", "records=records.jsonl")
PREPARE = ("prepare", "data/records.yaml", "model=model", "records=records.jsonl", "output=out")
CASES = {
    "train, no model": ((*TRAIN,), "no model is given. init_from=CHECKPOINT"),
    "train, missing checkpoint": ((*TRAIN, "init_from=nowhere"), "nowhere: no such file or folder"),
    "train, missing data": ((*TRAIN, "init_from=model", "data.datasets.mine.path=lost.jsonl"), "lost.jsonl: no such file or folder"),
    "train, unfinished data": ((*TRAIN, "init_from=model", "data.datasets.mine.path=unfinished"), "unfinished: is not finished"),
    "train, missing samples": ((*TRAIN, "init_from=model", "samples.records=lost.jsonl"), "lost.jsonl: no such file or folder"),
    "train, missing validation": (
        (*TRAIN, "init_from=model", "validation.data.datasets.held.path=lost.jsonl"),
        "lost.jsonl: no such file or folder",
    ),
    "train, unwritable storage": ((*TRAIN, "init_from=model", "storage=file/in"), "file/in"),
    "train, clash": ((*TRAIN, "init_from=model", "device_batch_size=5"), "device_batch_size=5 does not divide"),
    "train, configuration as weights": (
        (*TRAIN, f"init_from={ROOT}/configs/models/molmo-7b-d.yaml"),
        "weights are in a checkpoint folder",
    ),
    "evaluate, missing model": ((*EVALUATE, "model=nowhere"), "nowhere: no such file or folder"),
    "evaluate, missing records": ((*EVALUATE, "records=lost.jsonl"), "lost.jsonl: no such file or folder"),
    "evaluate, unwritable output": ((*EVALUATE, "output=file/in"), "output=file/in: cannot be written"),
    "prepare, missing model": ((*PREPARE, "model=nowhere"), "nowhere"),
    "prepare, missing records": ((*PREPARE, "records=lost.jsonl"), "lost.jsonl: no such file or folder"),
    "prepare, unwritable output": ((*PREPARE, "output=file/in"), "file/in"),
    "serve, missing model": (("serve", "serve/own.yaml", "model=nowhere"), "nowhere: no such file or folder"),
    "serve, unknown version": (("serve", "serve/own.yaml", "model=models:/nobody@champion"), "nobody"),
    "register, missing checkpoint": (("register", "register/own.yaml", "checkpoint=nowhere", "name=n"), "nowhere: no such file or folder"),
    "inventory, missing records": (
        ("inventory", "train/finetune.yaml", "init_from=model", "data.datasets.mine.path=lost.jsonl"),
        "lost.jsonl: no such file or folder",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_before_ray_starts(name, place):
    arguments, words = CASES[name]
    result = molmo(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.splitlines()) <= 3, result.stderr
    if "no such" in words:
        assert f"else the current folder, {place}" in result.stderr


def test_port_in_use(place):
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = molmo("serve", "serve/own.yaml", "model=model", f"port={server.getsockname()[1]}")
    assert result.exit_code == 2
    assert "is in use; choose another" in result.stderr


def test_settings_of_another_run(place):
    """A run's folder is compared with the settings before Ray starts."""
    folder = Path("runs/finetune")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": "1", "tracking_uri": "x", "identity": {"seed": 1}}))
    result = molmo(*TRAIN, "init_from=model")
    assert result.exit_code == 2
    assert "holds a run with other settings" in result.stderr


def test_a_submitted_job_says_what_its_folder_is(place, monkeypatch):
    copy = place / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    result = molmo("register", "register/own.yaml", "checkpoint=runs/demo/model", "name=n")
    assert result.exit_code == 2
    assert "without what .gitignore names (runs/, for example): give absolute paths" in result.stderr
