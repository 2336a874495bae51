"""The services of deploy/compose.yaml without docker: the same command, on loopback."""

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from pipelines.serving.port import free_port

COMPOSE = Path(__file__).parent.parent.parent / "deploy/compose.yaml"
PASSWORD = "p@ss/word:%41"


def wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """The address of a database server, as `HOST:PORT`, whose user mlflow has the password `PASSWORD`."""
    if not (shutil.which("initdb") and shutil.which("postgres")):
        pytest.skip("PostgreSQL is not installed")
    home = tmp_path_factory.mktemp("postgres")
    port = free_port()
    # It refuses to run as root.
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    if user:
        for folder in (home, *home.parents[: len(home.parts) - 2]):
            folder.chmod(folder.stat().st_mode | 0o011)
        shutil.chown(home, "postgres", "postgres")
    (home / "password").write_text(PASSWORD)
    run = [*user, "initdb", "-D", home / "data", "-U", "mlflow", f"--pwfile={home / 'password'}", "-A", "scram-sha-256"]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    options = ["-p", str(port), "-k", str(home), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    with subprocess.Popen([*user, "postgres", "-D", home / "data", *options], stderr=subprocess.DEVNULL) as server:
        try:
            psql = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "postgres", "-c", "create database mlflow"]
            deadline = time.monotonic() + 60
            while subprocess.run(psql, env={**os.environ, "PGPASSWORD": PASSWORD}, capture_output=True).returncode:
                assert time.monotonic() < deadline, "PostgreSQL does not come up"
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def mlflow_service():
    """The service `mlflow` of the compose file: its command and environment."""
    service = yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]
    return service["command"], service["environment"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def mlflow_server(request, mlflow_service, tmp_path_factory):
    """An MLflow server's URL, started by the compose file's command with each kind of database."""
    command, environment = mlflow_service
    home = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    changed = {"--host": "127.0.0.1", "--port": str(port), "--workers": "1", "--artifacts-destination": str(home / "artifacts")}
    changed["--allowed-hosts"] = f"mlflow:5000,127.0.0.1:{port}"
    names = [word.partition("=")[0] for word in command]
    assert changed.keys() <= set(names)
    words = [f"{name}={changed[name]}" if name in changed else word for name, word in zip(names, command)]
    environment = {**os.environ, **environment, "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home / 'mlflow.db'}"}
    if request.param == "postgresql":
        address = request.getfixturevalue("postgres")
        environment["MLFLOW_BACKEND_STORE_URI"] = mlflow_service[1]["MLFLOW_BACKEND_STORE_URI"].replace("postgres:5432", address)
        environment["PGPASSWORD"] = PASSWORD
    log = home / "log"
    program = Path(sys.executable).with_name(words[0])
    with log.open("w") as out, subprocess.Popen([program, *words[1:]], stdout=out, stderr=out, env=environment, cwd=home) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(f"{url}/health", server, log)
            yield url
        finally:
            server.terminate()
