"""`python -m jobs.serve`: comes up, answers, and leaves nothing behind when it is stopped."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import ray
from PIL import Image

from jobs.serve import read_settings, serve
from molmo_core.config import ConfigError
from pipelines.serving import client
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_serves_until_it_is_stopped(tiny_checkpoint, tmp_path):
    port = free_port()
    key = "a-key-of-a-test-0123456789"
    (tmp_path / "keys").write_text(key)
    (tmp_path / "keys").chmod(0o600)
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: {tiny_checkpoint}\nname: tiny\nport: {port}\napi_keys_file: keys\n")
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
        api = openai.OpenAI(base_url=f"{url[0]}/v1", api_key=key, max_retries=0, timeout=120)
        whole = api.chat.completions.create(**body).choices[0].message.content
        streamed = api.chat.completions.create(**body, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole
        for path, status in (("/health", 200), ("/", 200), ("/ready", 401), ("/v1/models", 401), ("/metrics", 401), ("/nothing", 401)):
            assert httpx.get(url[0] + path).status_code == status, path
        with pytest.raises(openai.AuthenticationError, match="not one of this server's") as caught:
            openai.OpenAI(base_url=f"{url[0]}/v1", api_key=f"{key}x").models.list()
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        server.send_signal(signal.SIGINT)
        rest = server.stdout.read()
        assert server.wait(timeout=120) == 0
    assert rest.endswith("Stopping ...\nStopped.\n")
    assert key not in rest
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_settings_of_a_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("model: models:/mine@champion\nport: 8100\n")
    assert read_settings("model=runs/x", ["port=8200"]) == ServeConfig(model="runs/x", port=8200)
    assert read_settings("own.yaml", ["port=8200"]) == ServeConfig(model="models:/mine@champion", port=8200)
    with pytest.raises(ConfigError, match="either model or models must be given"):
        read_settings(None, None)


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


def test_keys_are_asked_for_before_a_cluster_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("MOLMO_API_KEYS", raising=False)
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match="there are no API keys"):
        serve(ServeConfig(model=str(tmp_path), host="0.0.0.0", port=port))
    assert not ray.is_initialized()
