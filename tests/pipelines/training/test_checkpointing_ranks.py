"""Checkpoints of two ranks, without Ray: one rank's disk is full, one rank's shard is damaged."""

import json
import os
import resource
import socket
from pathlib import Path

import pytest
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import RandomLoader, tiny_config

from pipelines.training import loop
from pipelines.training.config import CheckpointConfig
from pipelines.training.errors import TrainingError
from pipelines.training.events import Note, Started

pytestmark = pytest.mark.slow


class Recorder(list):
    stop_requested = False
    send = alarm = list.append

    def note(self, text):
        self.append(Note(text))

    def heartbeat(self, step):
        pass


def rank_of_two(rank, folder, port):
    """Three starts of one run, one after the other in the same process; what each told is in `<rank>.json`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ray.train.torch.get_device = lambda: torch.device("cpu")
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
    Path(folder, f"{rank}.json").write_text(json.dumps({"starts": told, "left": left}))
    os._exit(0)


def start(folder, steps):
    """Trains to a step."""
    config = tiny_config(folder, name="run", steps=steps, num_workers=2, checkpoint=CheckpointConfig(interval=1, keep=None))
    events, error = Recorder(), None
    try:
        loop.train(config, RandomLoader, events)
    except TrainingError as caught:
        error = str(caught)
    notes, started = [e.text for e in events if isinstance(e, Note)], [e.step for e in events if isinstance(e, Started)]
    return {"error": error, "notes": notes, "started": started}


def test_what_befalls_one_rank_is_known_to_both(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(rank_of_two, (str(tmp_path), port), nprocs=2)
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        first, full, damaged = told["starts"]
        assert first == {"error": None, "notes": [], "started": [0]}
        assert full["started"] == [2]
        assert "step_000003 cannot be written: " in full["error"]
        assert "step_000002 and what was saved before it are whole" in full["error"]
        assert told["left"] == ["latest", "step_000001", "step_000002"]
        assert damaged["error"] is None
        assert damaged["started"] == [1]
        assert ["__1_0.distcp: its content has changed" in note for note in damaged["notes"]] == [True]
