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
    send = list.append

    def heartbeat(self, step):
        pass


def rank_of_two(rank, folder, port, steps, room):
    """Trains to a step; `room` is the size that rank 1's files may have. What happened is in `<rank>.json`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ray.train.torch.get_device = lambda: torch.device("cpu")
    ray.train.report = lambda *_, **__: None
    config = tiny_config(folder, name="run", steps=steps, num_workers=2, checkpoint=CheckpointConfig(interval=1, keep=None))
    events, error = Recorder(), None
    if rank == 1 and room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        loop.train(config, RandomLoader, events)
    except TrainingError as caught:
        error = str(caught)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    notes, started = [e.text for e in events if isinstance(e, Note)], [e.step for e in events if isinstance(e, Started)]
    Path(folder, f"{rank}.json").write_text(json.dumps({"error": error, "notes": notes, "started": started}))
    os._exit(0)


def train(folder, steps, room=None):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(rank_of_two, (str(folder), port, steps, room), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_what_befalls_one_rank_is_known_to_both(tmp_path):
    train(tmp_path, 2)
    for told in train(tmp_path, 3, room=10_000):
        assert told["started"] == [2]
        assert "step_000003 cannot be written: " in told["error"]
        assert "step_000002 and what was saved before it are whole" in told["error"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step_000001", "step_000002"]
    shard = tmp_path / "run/step_000002/__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for told in train(tmp_path, 3):
        assert told["error"] is None
        assert told["started"] == [1]
        assert ["__1_0.distcp: its content has changed" in note for note in told["notes"]] == [True]
