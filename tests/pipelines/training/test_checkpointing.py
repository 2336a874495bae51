"""Checkpoints of the loop in one process: damage of every kind is found and stepped over, a full disk loses nothing."""

import errno
import functools
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
import ray.train.torch
import torch
from batches import RandomLoader, tiny_config
from torch.distributed.checkpoint.api import CheckpointException

from molmo_core.checkpoint import load_model
from molmo_core.checkpoint.checksums import CHECKSUMS_NAME
from molmo_core.checkpoint.folder import CheckpointError
from molmo_core.config import ConfigError
from pipelines.training import checkpointing, loop
from pipelines.training.checkpointing import cause
from pipelines.training.config import CheckpointConfig
from pipelines.training.errors import NonFiniteError, TrainingError, passing, unwritable
from pipelines.training.events import Before, Done, Metrics, Note, Saved, Started
from pipelines.training.storage import Storage

SHARD, METADATA, STATE = "__0_0.distcp", ".metadata", "state.json"


class Recorder(list):
    stop_requested = False
    send = alarm = list.append

    def note(self, text):
        self.append(Note(text))

    def heartbeat(self, step):
        pass

    def only(self, kind):
        return [event for event in self if isinstance(event, kind)]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains the run `tmp_path / "run"` to a step, with a checkpoint of every step; returns its events."""
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("pipelines.training.preemption.ASK_S", float("inf"))  # here is no Ray Train to ask

    def train(steps, keep=None, interval=1, keep_every=None, storage=tmp_path, name="run", loader=RandomLoader):
        recorder = Recorder()
        checkpoint = CheckpointConfig(interval=interval, keep=keep, keep_every=keep_every)
        loop.train(tiny_config(storage, name=name, steps=steps, checkpoint=checkpoint), loader, recorder)
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
    checkpointer = checkpointing.Checkpointer(None, None, Storage(str(tmp_path), "run"), CheckpointConfig(), print)
    assert checkpointer.damage(step.name) == []
    rng = random.Random(0)
    for _ in range(40):
        path = rng.choice(files)
        offset = rng.choice([0, path.stat().st_size - 1, rng.randrange(path.stat().st_size)])
        flip(path, offset)
        assert checkpointer.damage(step.name) == [f"{path.name}: its content has changed since it was written (checksum)"]
        flip(path, offset)
    assert checkpointer.damage(step.name) == []


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
    assert unwritable(cause(CheckpointException("write", {0: (lost, None), 1: (full, None)}))) == "No space left on device"
    assert unwritable(cause(CheckpointException("write", {0: (lost, None)}))) is None
    assert [passing(error) for error in (full, lost, SLOW_SERVER)] == [False, False, True]


def test_half_written_folders_of_killed_processes_go(train, tmp_path):
    train(1)
    storage = Storage(str(tmp_path), "run")
    (tmp_path / "run/.step_000002.partial").mkdir()
    (tmp_path / "run/.step_000002.partial/__0_0.distcp").write_bytes(b"half")
    (tmp_path / "run/step_000001/.model.x1").mkdir()
    assert storage.steps() == [1]
    storage.tidy()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"step_000001", "latest", "writer"}
    assert not (tmp_path / "run/step_000001/.model.x1").exists()


def test_behind_a_url_nothing_is_copied_on_this_machine_first(train, tmp_path, monkeypatch):
    """A filesystem of fsspec's."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    url = f"memory://{tmp_path.name}"
    events = train(4, storage=url, keep=2, keep_every=3)
    assert events.only(Saved) == [Saved(1), Saved(2), Saved(3), Saved(4)]
    storage = Storage(url, "run")
    assert storage.steps() == [4, 3]
    assert events.only(Done) == [Done(4, f"{url}/run/step_000004/model")]
    with fsspec.open(f"{url}/run/step_000004/model/model.safetensors") as file:
        assert file.read() == (undisturbed(train, 4) / "model.safetensors").read_bytes()
    storage.delete(f"step_000004/{CHECKSUMS_NAME}")  # as if it had been killed before the end
    events = train(5, storage=url, keep=2, keep_every=3)
    assert events.only(Started) == [Started(3)]
    assert "step_000004 is damaged: checksums.json: missing" in events.only(Note)[0].text
    assert storage.steps() == [5, 4, 3]
    assert list(scratch.iterdir()) == []


def undisturbed(train, steps):
    """The model of a run to that step that nothing befell."""
    return Path(train(steps, name="undisturbed").only(Done)[0].model)


class Failing:
    """Fails what is written into a storage, from some call on, as often as it is told; can wait there."""

    def __init__(self, monkeypatch, error, times, name="distcp"):
        self.times = times
        create = Storage.create

        def created(storage, path):
            if name in path and self.times > 0:
                self.times -= 1
                raise error
            return create(storage, path)

        monkeypatch.setattr(Storage, "create", created)


SLOW_SERVER = TimeoutError(errno.ETIMEDOUT, "Connection timed out")


def test_a_storage_that_answers_the_third_time_costs_nothing(train, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "RETRY_S", (0.0, 0.0, 0.0))
    Failing(monkeypatch, SLOW_SERVER, times=2)
    events = train(2)
    assert (events.only(Saved), events.only(Note)) == ([Saved(1), Saved(2)], [])


def test_a_failed_save_costs_a_line_and_too_many_the_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "RETRY_S", (0.0,))
    failing = Failing(monkeypatch, SLOW_SERVER, times=4)
    events = train(4)
    assert events.only(Saved) == [Saved(3), Saved(4)]
    first, second = (note.text for note in events.only(Note))
    assert "step_000001 cannot be written: [Errno 110] Connection timed out; nothing had been saved before. Training continues" in first
    assert "step_000002 cannot be written" in second
    failing.times = 100
    with pytest.raises(TrainingError, match=r"step_000007 cannot .*step_000004 and what .* are whole. 3 saves in a row failed"):
        train(9)
    failing.times = 0
    events = train(9)
    assert events.only(Started) == [Started(4)]
    assert Path(events.only(Done)[0].model, "model.safetensors").read_bytes() == (undisturbed(train, 9) / "model.safetensors").read_bytes()


def test_training_goes_on_while_a_checkpoint_is_written(train, tmp_path, monkeypatch):
    """The first save cannot end before step 4 begins, nor can it be seen before it has ended."""
    create, reached, seen = Storage.create, threading.Event(), []

    def created(storage, path):
        assert reached.wait(60)
        seen.append(storage.steps())
        return create(storage, path)

    monkeypatch.setattr(Storage, "create", created)
    events = train(6, interval=2, loader=functools.partial(Reaching, step=4, reached=reached))
    assert events.only(Saved) == [Saved(2), Saved(4), Saved(6)]
    assert seen[0] == []
    assert events.only(Done)[0].model.endswith("step_000006/model")
    assert Path(events.only(Done)[0].model, "model.safetensors").read_bytes() == (undisturbed(train, 6) / "model.safetensors").read_bytes()
    cut(tmp_path / "run/step_000006" / SHARD)
    assert train(6).only(Started) == [Started(4)], "what was staged in step 2 and 4 did not change while it was written"


class Reaching(RandomLoader):
    """Says that a step has begun."""

    def __init__(self, *arguments, step, reached, **settings):
        super().__init__(*arguments, **settings)
        self.step, self.reached = step, reached

    def __iter__(self):
        for number, batch in enumerate(super().__iter__(), 1):
            if number == self.step:
                self.reached.set()
            yield batch


def test_a_save_that_is_being_written_ends_before_an_error_ends_the_run(train, monkeypatch):
    with pytest.raises(NonFiniteError, match=r"step 3: .*the last checkpoint is step_000002"):
        train(4, loader=functools.partial(RandomLoader, poison_at=3))
    assert train(4).only(Started) == [Started(2)]


class Overtaken(RandomLoader):
    """Other workers continue the run while step 3 waits for its batch, as if this driver had been killed."""

    def __init__(self, *arguments, folder, **settings):
        super().__init__(*arguments, **settings)
        self.folder = folder

    def __iter__(self):
        for number, batch in enumerate(super().__iter__(), 1):
            if number == 3:
                Storage(str(self.folder), "run").write(checkpointing.WRITER_NAME, "others")
            yield batch


def test_workers_that_outlive_their_driver_save_no_more(train, tmp_path):
    with pytest.raises(checkpointing.Superseded, match="has been continued by other workers"):
        train(6, loader=functools.partial(Overtaken, folder=tmp_path))
    newest = Storage(str(tmp_path), "run").steps()[0]
    assert newest in (1, 2), "that of step 2 may have been under way"
    assert train(3).only(Started) == [Started(newest)]


def test_numbers_that_a_killed_driver_has_not_heard_are_sent_again(train):
    heard = train(3).only(Metrics)
    (before,) = train(4).only(Before)
    assert before.metrics == heard
    assert [entry.when for entry in before.metrics] == [entry.when for entry in heard]


KILLED = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import ray.train.torch, torch
from batches import RandomLoader, tiny_config
from pipelines.training import loop, shards
from pipelines.training.config import CheckpointConfig
from pipelines.training.storage import Storage

ray.train.torch.get_device = lambda: torch.device("cpu")
calls, moment = 0, 0

def dying(method):
    def call(*arguments, **settings):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), 9)
        return method(*arguments, **settings)
    return call

class Reporter:
    stop_requested = False
    def send(self, event): pass
    note = alarm = heartbeat = send

for kind, name in ((shards._Summed, "write"), (Storage, "write"), (Storage, "publish"), (Storage, "delete")):
    setattr(kind, name, dying(getattr(kind, name)))
for moment in map(int, sys.stdin):
    reading, writing = os.pipe()
    if os.fork() == 0:
        config = tiny_config(Path(sys.argv[2], str(moment)), name="run", steps=3, checkpoint=CheckpointConfig(interval=1, keep=1))
        loop.train(config, RandomLoader, Reporter())
        os.write(writing, str(calls).encode())
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    os.close(writing)
    print(json.dumps([status, os.read(reading, 10).decode()]), flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_of_a_save_leaves_a_whole_checkpoint(train, tmp_path):
    """Killed before every n-th thing that it does to the storage."""
    expected = (undisturbed(train, 3) / "model.safetensors").read_bytes()

    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(moment):
            process.stdin.write(f"{moment}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        status, total = run(0)
        assert status == 0
        moments = [*random.Random(1).sample(range(int(total) // 3, int(total)), 5), int(total) - 1]
        assert [run(moment)[0] for moment in moments] == [-signal.SIGKILL] * len(moments)
        process.stdin.close()
    for moment in moments:
        folder = tmp_path / str(moment)
        newest = Storage(str(folder), "run").read("latest")
        assert newest in [f"step_{step:06d}" for step in Storage(str(folder), "run").steps()]
        events = train(3, storage=folder)
        assert events.only(Started)[0].step >= 1
        assert Path(events.only(Done)[0].model, "model.safetensors").read_bytes() == expected


def test_checksums_are_json_of_every_file(train, tmp_path):
    train(1)
    files = json.loads((tmp_path / "run/step_000001" / CHECKSUMS_NAME).read_text())["files"]
    assert set(files) == {SHARD, METADATA, STATE}
    model = json.loads((tmp_path / "run/step_000001/model" / CHECKSUMS_NAME).read_text())["files"]
    assert {"model.safetensors", "config.yaml"} <= set(model)
    assert any(name.startswith("tokenizer/") for name in model)
