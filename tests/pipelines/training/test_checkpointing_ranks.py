"""Checkpoints of two ranks, without Ray: one rank's disk is full, one rank's shard is damaged."""

import json
import os
import resource
from pathlib import Path

import pytest
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import RandomLoader, tiny_config

from molmo_core.checkpoint import load_model
from pipelines.training import loop, preemption
from pipelines.training.config import CheckpointConfig, EmaConfig
from pipelines.training.errors import TrainingError
from pipelines.training.events import Metrics, Note, Started, Unusual
from pipelines.training.parallel_config import ParallelConfig

pytestmark = pytest.mark.slow


class Recorder(list):
    stop_requested = False
    send = alarm = list.append

    def note(self, text):
        self.append(Note(text))

    def heartbeat(self, step):
        pass


def alone_with_torch():
    """There is no Ray Train around this process."""
    ray.train.torch.get_device = lambda: torch.device("cpu")
    preemption.ASK_S = float("inf")


def rank_of_two(rank, folder):
    """Three starts of one run, one after the other in the same process; what each told is in `<rank>.json`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    alone_with_torch()
    told = [start(folder, steps=2)]
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    told.append(start(folder, steps=3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    left = sorted(path.name for path in Path(folder, "run").iterdir())
    dist.barrier()
    if rank == 0:
        shard = Path(folder, "run/step_000002/__1_0.distcp")
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    told.append(start(folder, steps=3))
    told.append(start(folder, steps=5, loader=OneRankPoisoned, on_non_finite="skip"))
    Path(folder, f"{rank}.json").write_text(json.dumps({"starts": told, "left": left}))
    os._exit(0)


class OneRankPoisoned(RandomLoader):
    """In step 4 a pixel of the second rank is not a number."""

    def __iter__(self):
        for batch in super().__iter__():
            if self.rank == 1 and self.positions[self.owned[0]] == 4:
                batch["images"][0, 0, 0, 0] = float("nan")
            yield batch


def start(folder, steps, loader=RandomLoader, **changes):
    """Trains to a step."""
    settings = {"name": "run", "steps": steps, "num_workers": 2, "checkpoint": CheckpointConfig(interval=1, keep=None)}
    events, error = Recorder(), None
    try:
        loop.train(tiny_config(folder, **settings | changes), loader, events)
    except TrainingError as caught:
        error = str(caught)
    notes, started = [e.text for e in events if isinstance(e, Note)], [e.step for e in events if isinstance(e, Started)]
    unusual = [[e.step, e.examples] for e in events if isinstance(e, Unusual)]
    return {"error": error, "notes": notes, "started": started, "unusual": unusual}


def test_what_befalls_one_rank_is_known_to_both(tmp_path):
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        first, full, damaged, poisoned = told["starts"]
        assert first == {"error": None, "notes": [], "started": [0], "unusual": []}
        assert full["started"] == [2]
        assert "step_000003 cannot be written: " in full["error"]
        assert "step_000002 and what was saved before it are whole" in full["error"]
        assert told["left"] == ["latest", "step_000001", "step_000002", "writer"]
        assert damaged["error"] is None
        assert damaged["started"] == [1]
        assert ["__1_0.distcp: its content has changed" in note for note in damaged["notes"]] == [True]
        assert poisoned["unusual"] == [[4, ["random[0.4]", "random[1.4]", "random[2.4]", "random[3.4]"]]]
        assert poisoned["error"] is None


def rank_of_some(rank, world, replicate, folder, steps):
    """Goes on with a run, on `world` ranks in `replicate` groups; the first one's losses are in `losses_<steps>.json`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous_{steps}", rank=rank, world_size=world)
    alone_with_torch()
    events = Recorder()
    parallel, ema = ParallelConfig(replicate=replicate), EmaConfig(decay=0.5)
    config = tiny_config(folder, name="moved", steps=steps, num_workers=world, parallel=parallel, global_batch_size=12, ema=ema)
    loop.train(config, RandomLoader, events)
    if rank == 0:
        losses = {event.step: event.values["loss"] for event in events if isinstance(event, Metrics)}
        Path(folder, f"losses_{steps}.json").write_text(json.dumps(losses))
    dist.barrier()
    os._exit(0)


def test_a_run_moves_from_two_ranks_to_one_to_three_and_to_two_groups_of_two(tmp_path, monkeypatch):
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(preemption, "ASK_S", float("inf"))

    def alone(name, steps):
        events = Recorder()
        loop.train(tiny_config(tmp_path, name=name, steps=steps, global_batch_size=12, ema=EmaConfig(decay=0.5)), RandomLoader, events)
        return {event.step: event.values["loss"] for event in events if isinstance(event, Metrics)}

    expected, found = alone("alone", 8), {}
    for world, replicate, steps in ((2, 1, 2), (1, 1, 4), (3, 1, 6), (4, 2, 8)):
        if world == 1:
            found |= alone("moved", steps)
            continue
        mp.spawn(rank_of_some, (world, replicate, str(tmp_path), steps), nprocs=world)
        found |= {int(step): loss for step, loss in json.loads((tmp_path / f"losses_{steps}.json").read_text()).items()}
    assert list(found) == list(range(1, 9))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    models = [load_model(tmp_path / name / "step_000008" / "model").state_dict() for name in ("alone", "moved")]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-3, atol=1e-5, msg=f"the average of {name}")
