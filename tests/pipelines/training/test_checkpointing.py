"""Checkpoints of the loop in one process: damage of every kind is found and stepped over, a full disk loses nothing."""

import errno
import json
import random
import resource
import shutil

import pytest
import ray.train
import ray.train.torch
import torch
from batches import RandomLoader, tiny_config
from torch.distributed.checkpoint.api import CheckpointException

from molmo_core.checkpoint import load_model
from molmo_core.checkpoint.checksums import CHECKSUMS_NAME
from molmo_core.checkpoint.folder import CheckpointError
from molmo_core.config import ConfigError
from pipelines.training import checkpointing, loop
from pipelines.training.config import CheckpointConfig
from pipelines.training.errors import TrainingError
from pipelines.training.events import Done, Note, Saved, Started
from pipelines.training.storage import Storage

SHARD, METADATA, STATE = "__0_0.distcp", ".metadata", "state.json"


class Recorder(list):
    stop_requested = False
    send = list.append

    def heartbeat(self, step):
        pass

    def only(self, kind):
        return [event for event in self if isinstance(event, kind)]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains the run `tmp_path / "run"` to a step, with a checkpoint of every step; returns its events."""
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train, "report", lambda *_, **__: None)

    def train(steps, keep=None, interval=1):
        recorder = Recorder()
        config = tiny_config(tmp_path, name="run", steps=steps, checkpoint=CheckpointConfig(interval=interval, keep=keep))
        loop.train(config, RandomLoader, recorder)
        return recorder

    return train


def flip(path, offset=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


KINDS = {
    f"{what} {file}": (lambda step, file=file, change=change: change(step / file), file)
    for file in (SHARD, METADATA, STATE, CHECKSUMS_NAME)
    for what, change in {"cut": cut, "lost": lambda path: path.unlink(), "empty": lambda path: path.write_bytes(b"")}.items()
}
KINDS |= {f"one bit of {file}": (lambda step, file=file: flip(step / file), file) for file in (SHARD, METADATA, STATE)}
KINDS |= {
    "everything in it gone": (lambda step: [path.unlink() for path in step.iterdir() if path.is_file()], CHECKSUMS_NAME),
    "the folder gone": (shutil.rmtree, "is gone"),
    "not checksums": (lambda step: (step / CHECKSUMS_NAME).write_text('{"files": {"x": 1}}'), CHECKSUMS_NAME),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train, tmp_path, kind):
    train(3)
    whole = (tmp_path / "run/step_000003/model/model.safetensors").read_bytes()
    change, named = KINDS[kind]
    change(tmp_path / "run" / "step_000003")
    events = train(3)
    (note,) = events.only(Note)
    assert "step_000003" in note.text
    assert named in note.text
    assert events.only(Started) == [Started(2)]
    assert (tmp_path / "run/step_000003/model/model.safetensors").read_bytes() == whole, "trained again, it is the same"
    assert train(3).only(Note) == []


def test_any_byte_of_any_file_is_watched(train, tmp_path):
    train(1)
    step = tmp_path / "run" / "step_000001"
    files = [path for path in step.iterdir() if path.is_file() and path.name != CHECKSUMS_NAME]
    checkpointer = checkpointing.Checkpointer(None, None, Storage(str(tmp_path), "run"))
    assert checkpointer._damage(step) == []
    rng = random.Random(0)
    for _ in range(40):
        path = rng.choice(files)
        offset = rng.choice([0, path.stat().st_size - 1, rng.randrange(path.stat().st_size)])
        flip(path, offset)
        assert checkpointer._damage(step) == [f"{path.name}: its content has changed since it was written (checksum)"]
        flip(path, offset)
    assert checkpointer._damage(step) == []


def test_several_damaged_ones_are_stepped_over_and_none_whole_is_an_error(train, tmp_path):
    train(3)
    for step in (2, 3):
        cut(tmp_path / "run" / f"step_00000{step}" / SHARD)
    assert train(3).only(Started) == [Started(1)]
    for step in (1, 2, 3):
        (tmp_path / "run" / f"step_00000{step}" / STATE).unlink()
    message = r"(?s)none of the run's checkpoints.*step_000003.*step_000001.*state.json: missing.*delete \S+/run "
    with pytest.raises(ConfigError, match=message):
        train(3)


def test_damaged_ones_do_not_count_among_those_kept(train, tmp_path):
    """Resumed before a damaged newest one, the run must not delete whole checkpoints in its favour."""
    train(5)
    cut(tmp_path / "run" / "step_000005" / SHARD)
    cut(tmp_path / "run" / "step_000004" / SHARD)
    events = train(4, keep=2)
    assert events.only(Started) == [Started(3)]
    assert Storage(str(tmp_path), "run").steps() == [4, 3]


def test_a_model_that_leaves_has_checksums_too(train, tmp_path):
    (done,) = train(1).only(Done)
    copy = tmp_path / "copy"
    shutil.copytree(done.model, copy)
    expected = load_model(done.model).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in load_model(copy).state_dict().items())
    flip(copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"copy differs from what was written: model.safetensors: its content has changed"):
        load_model(copy)
    with pytest.raises(CheckpointError, match=r"copy differs from what was written: model.safetensors"):
        tiny_config(tmp_path).model.build_model().load_checkpoint(copy)


@pytest.fixture
def largest_file():
    """Sets the size that files may have, as a disk that becomes full does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 500, 5_000, 100_000])
def test_a_storage_that_takes_no_more_ends_the_run_and_loses_nothing(train, tmp_path, largest_file, room):
    undisturbed = train(3).only(Done)[0].model
    expected = load_model(undisturbed).state_dict()
    shutil.rmtree(tmp_path / "run")
    train(2)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    largest_file(room)
    message = r"step_000003 cannot be written: File too large.*step_000002 and what was saved before it are whole"
    with pytest.raises(TrainingError, match=message):
        train(3)
    largest_file(resource.RLIM_INFINITY)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    events = train(3)
    assert (events.only(Started), events.only(Note)) == ([Started(2)], [])
    assert all(torch.equal(expected[name], tensor) for name, tensor in load_model(events.only(Done)[0].model).state_dict().items())


def test_a_model_that_cannot_be_written_leaves_its_checkpoint(train, tmp_path, monkeypatch):
    train(2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("molmo_core.checkpoint.native.write_safetensors", full)
        with pytest.raises(TrainingError, match=r"step_000003/model cannot be written: No space left"):
            train(3)
    events = train(3)
    assert (events.only(Started), events.only(Saved)) == ([Started(3)], [])
    assert load_model(events.only(Done)[0].model)


def test_only_a_storage_that_is_full_ends_a_run():
    """After anything else, as a rank that is lost, Ray Train may try again."""
    full, lost = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("Connection closed by peer")
    assert checkpointing.unwritable(CheckpointException("write", {1: (full, None)})) == "No space left on device"
    assert checkpointing.unwritable(CheckpointException("write", {0: (lost, None)})) is None
    assert checkpointing.unwritable(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")) is not None
    chained = RuntimeError("while writing")
    chained.__context__ = full
    assert checkpointing.unwritable(chained) == "No space left on device"


def test_half_written_folders_of_killed_processes_go(train, tmp_path):
    train(1)
    storage = Storage(str(tmp_path), "run")
    (tmp_path / "run/.step_000002.partial").mkdir()
    (tmp_path / "run/.step_000002.partial/__0_0.distcp").write_bytes(b"half")
    (tmp_path / "run/step_000001/.model.x1").mkdir()
    assert storage.steps() == [1]
    storage.tidy()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"step_000001", "latest"}
    assert not (tmp_path / "run/step_000001/.model.x1").exists()


def test_behind_a_url_files_are_written_elsewhere_first(train, tmp_path, monkeypatch):
    """A filesystem of pyarrow's that is not the machine's own."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    opened = Storage.__init__

    def remote(self, *arguments):
        opened(self, *arguments)
        self.local = None

    monkeypatch.setattr(Storage, "__init__", remote)
    events = train(3, keep=2)
    assert events.only(Saved) == [Saved(1), Saved(2), Saved(3)]
    assert Storage(str(tmp_path), "run").steps() == [3, 2]
    assert load_model(events.only(Done)[0].model)
    (tmp_path / "run/step_000003" / CHECKSUMS_NAME).unlink()
    assert train(3).only(Started) == [Started(2)]
    assert list(scratch.glob("molmo-*")) == []


def test_checksums_are_json_of_every_file(train, tmp_path):
    train(1)
    files = json.loads((tmp_path / "run/step_000001" / CHECKSUMS_NAME).read_text())["files"]
    assert set(files) == {SHARD, METADATA, STATE}
    model = json.loads((tmp_path / "run/step_000001/model" / CHECKSUMS_NAME).read_text())["files"]
    assert {"model.safetensors", "config.yaml"} <= set(model)
    assert any(name.startswith("tokenizer/") for name in model)
