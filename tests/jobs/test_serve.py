"""`python -m jobs.serve`: comes up, answers, and leaves nothing behind when it is stopped."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from jobs.serve import serve
from molmo_core.config import ConfigError
from pipelines.serving import client
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_serves_until_it_is_stopped(tiny_checkpoint, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: {tiny_checkpoint}\nname: tiny\nport: {port}\n")
    command = [sys.executable, "-m", "jobs.serve", str(config), "max_new_tokens=4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as server:
        ready = next((line for line in server.stdout if line.startswith("Ready")), "")
        url = re.search(r"http://[\d.:]+", ready)
        assert url, "the server ended before it was ready"
        assert url[0] == f"http://127.0.0.1:{port}"
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "png")
        body = client.request("tiny", "what is this?", buffer.getvalue())
        whole = client.post(url[0], body)["choices"][0]["message"]["content"]
        assert "".join(client.stream(url[0], body)) == whole
        server.send_signal(signal.SIGINT)
        rest = server.stdout.read()
        assert server.wait(timeout=120) == 0
    assert rest.endswith("Stopping ...\nStopped.\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_port_in_use_is_told_before_a_cluster_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port} is in use"):
            serve(ServeConfig(model=str(tmp_path), port=port))
    assert not ray.is_initialized()


def test_port_in_use(tiny_checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port} is in use"), serving(ServeConfig(model=str(tiny_checkpoint), port=port)):
            pytest.fail("a server on a port that is taken")
