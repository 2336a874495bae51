"""Jobs as a cluster's users start them: `ray job submit --working-dir . -- python -m jobs.train ...`, on a cluster of the test's own."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_ports(count):
    """Ports that were free a moment ago, below those that the system and above those that Ray hands out: nobody is given one meanwhile."""
    free = []
    for port in random.Random(os.getpid()).sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            free.append(port)
        if len(free) == count:
            break
    return free


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """The address of a cluster that `ray start` starts."""
    port, dashboard_port, client_port, agent_port = free_ports(4)
    folder = Path("/tmp") / f"ray-{os.getpid()}"  # sockets lie there: the path must be short
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    command = [
        RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}",
        "--num-cpus=4", f"--object-store-memory={256 << 20}", f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    log = open(tmp_path_factory.mktemp("cluster") / "log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard_port}"
    try:
        for _ in range(600):
            assert process.poll() is None, Path(log.name).read_text()
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the cluster did not start: {Path(log.name).read_text()}")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def submit(dashboard, entrypoint, env):
    """`ray job submit`, waiting for the end: (exit code, log)."""
    runtime = json.dumps({"env_vars": env, "excludes": ["/tests", "/runs", "/.gpu"]})
    command = [RAY, "job", "submit", f"--address={dashboard}", "--working-dir=.", "--runtime-env-json", runtime, "--", *entrypoint]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    for _ in range(30):
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
        log = result.stdout + result.stderr
        if "No available agent" not in log:  # the part of a young cluster that starts jobs comes up last
            return result.returncode, log
        time.sleep(2)
    pytest.fail(log)


def write_records(path, count):
    """Squares of one colour, with a question each."""
    rng = np.random.RandomState(0)
    rows = []
    for i in range(count):
        colour = ("red", "blue")[i % 2]
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[10:50, 10:50, 0 if colour == "red" else 2] = 150 + rng.randint(100)
        Image.fromarray(pixels).save(path.parent / f"{i}.png")
        messages = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": colour}]
        rows.append({"image": f"{i}.png", "messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_prepare_and_train_as_submitted_jobs(dashboard, tmp_path):
    write_records(tmp_path / "records.jsonl", 24)
    data, storage = tmp_path / "data", tmp_path / "runs"
    prepare = f"{sys.executable} -m jobs.prepare configs/data/records.yaml records={tmp_path}/records.jsonl output={data}"
    train = (
        f"{sys.executable} -m jobs.train configs/train/demo.yaml name=submitted storage={storage} data.datasets.easy_vqa.path={data} "
        f"model.llm.tokenizer.identifier={data}/tokenizer steps=4 log_interval=2 global_batch_size=4"
    )
    database = f"sqlite:///{tmp_path}/mlflow.db"
    code, log = submit(dashboard, ["sh", "-c", f"{prepare} && {train}"], {"MLFLOW_TRACKING_URI": database})
    assert code == 0, log
    assert "step 4/4  loss" in log
    assert "trained 4 of 4 steps" in log
    model = storage / "submitted" / "step_000004" / "model"
    assert f"model    {model}" in log
    assert {"config.yaml", "model.safetensors", "tokenizer"} <= {p.name for p in model.iterdir()}
    assert (tmp_path / "mlflow.db").is_file()
