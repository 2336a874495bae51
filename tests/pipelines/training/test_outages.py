"""What a run leans on goes away for real: a process of MLflow is killed, a file system is full."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.training import recorder as module
from pipelines.training.recorder import Recorder
from pipelines.training.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.alone]


class Server:
    """`mlflow server` on a database, always at the same address."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.process = folder, None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}", "--workers=1"]
        command += [f"--backend-store-uri=sqlite:///{self.folder}/server.db", f"--artifacts-destination={self.folder}/artifacts"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.2)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_a_tracking_server_that_is_killed_and_comes_back(tmp_path, monkeypatch):
    """Nothing waits for it meanwhile, and nothing is missing afterwards."""
    monkeypatch.setattr(module, "RETRY_S", 0.5)
    monkeypatch.setattr(module, "WARN_S", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    server, lines = Server(tmp_path), []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    server.start()
    try:
        run = tracking.Run("tests", "observed")
        recorder = Recorder(run, Storage(str(tmp_path), "run"), lines.append)
        recorder.metrics(0, {"loss": 0.0}, when=1000)
        server.kill()
        for step in range(1, 30):
            recorder.metrics(step, {"loss": float(step)}, when=1000 + step)
        until = time.monotonic() + 60
        while not lines:
            assert time.monotonic() < until
            recorder.look()
            time.sleep(0.1)
        assert "Training continues; what it logs is kept and sent later" in lines[0]
        assert recorder.storage.read(module.UNSENT_METRICS), "should this process die, too"
        server.start()
        recorder.close("FINISHED")
        assert len(lines) == 1
        assert [metric.step for metric in run.client.get_metric_history(run.id, "loss")] == list(range(30))
        assert run.client.get_run(run.id).info.status == "FINISHED"
        assert recorder.storage.read(module.UNSENT_METRICS) is None
    finally:
        server.kill()


FULL = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import ray.train.torch, torch
from batches import RandomLoader, tiny_config
from pipelines.training import checkpointing, loop, preemption
from pipelines.training.config import CheckpointConfig
from pipelines.training.errors import TrainingError
from pipelines.training.events import Started

ray.train.torch.get_device = lambda: torch.device("cpu")
preemption.ASK_S = float("inf")
disk = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)

class Reporter:
    stop_requested, started = False, None
    def send(self, event):
        if isinstance(event, Started):
            print("started", event.step)
    note = alarm = heartbeat = send

config = tiny_config(disk, name="run", steps=40, checkpoint=CheckpointConfig(interval=1, keep=None))
try:
    loop.train(config, RandomLoader, Reporter())
except TrainingError as error:
    print(error)
storage = checkpointing.Storage(str(disk), "run")
newest = storage.steps()[0]
print("newest", newest, storage.read("latest"), [path.name for path in (disk / "run").glob(".*")])
subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
config.steps = newest + 1
loop.train(config, RandomLoader, Reporter())
print("steps", storage.steps()[:2])
"""


def test_a_full_disk_gives_one_message_and_loses_nothing(tmp_path):
    """A file system of 3 MB, that takes more later."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here, not even in a namespace of one's own")
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", FULL, str(Path(__file__).parent), str(tmp_path / "disk")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    first, message, newest, second, steps = result.stdout.splitlines()
    step = int(newest.split()[1])
    assert (first, second) == ("started 0", f"started {step}")
    assert f"No space left on device; step_{step:06d} and what was saved before it are whole" in message
    assert newest == f"newest {step} step_{step:06d} []"
    assert steps == f"steps [{step + 1}, {step}]"
