"""A model goes through the MLflow server of deploy/compose.yaml: registered over HTTP, found by its alias, the same files."""

import urllib.error
import urllib.request

import pytest

from pipelines import tracking
from pipelines.registry.config import RegisterConfig
from pipelines.registry.register import register

pytestmark = pytest.mark.slow


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_comes_back_as_it_went(mlflow_server, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.chdir(tmp_path)
    registered = register(RegisterConfig(checkpoint=str(tiny_checkpoint), name="mine", alias="champion"))
    assert tracking.versioned("models:/mine@champion") == f"models:/mine/{registered['version']}"
    folder = tracking.resolve(f"models:/mine/{registered['version']}")
    assert contents(folder) == contents(tiny_checkpoint)


def test_only_known_names_of_the_server_are_answered(mlflow_server):
    """The compose file's name for it is one of them."""

    def status(host):
        request = urllib.request.Request(f"{mlflow_server}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host})
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("mlflow:5000") == 200
    assert status("elsewhere.example.com") == 403
