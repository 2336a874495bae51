"""Where runs and models are kept: folders of any name are found again, and places that do not last are refused."""

import shutil
import socket
from pathlib import Path

import pytest

from molmo_core.config import ConfigError
from pipelines import tracking
from pipelines.evaluation.config import EvaluateConfig
from pipelines.files import check_lasting
from pipelines.registry.config import RegisterConfig
from pipelines.serving.config import ServeConfig

ODD = [
    "my runs",
    "Ünï",
    "a#b",
    "a+b",
    "a%b",
    "a%20b",
    "%41",
    "a[b]",
    "a?b",
    "a?b=c&d",
    "~x",
    "it's",
    'q"q',
    "a;b",
    "a:b",
    "a*b",
    "日本",
    " x",
]


@pytest.fixture
def inside(tmp_path, monkeypatch, empty_database):
    """Goes into a folder of a name, with a database under `runs` there."""

    def enter(name, database="runs/mlflow.db"):
        folder = tmp_path / name
        (folder / database).parent.mkdir(parents=True)
        shutil.copy(empty_database, folder / database)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that it is put back afterwards
        return folder

    return enter


def model_in(folder):
    """A checkpoint's files, as far as registering looks at them."""
    folder.mkdir()
    (folder / "config.yaml").write_text("model_name: molmo\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("name", ODD)
def test_registered_from_and_into_any_folder(inside, name):
    folder = inside(name)
    tracking.register(model_in(Path(name)), "mine", "champion")
    found = tracking.resolve("models:/mine@champion")
    assert (found / "model.safetensors").read_bytes() == b"weights"
    assert found.is_relative_to(folder / "runs" / "mlartifacts")
    assert list(folder.parent.rglob("mlflow.db")) == [folder / "runs" / "mlflow.db"]


@pytest.mark.parametrize("given", ["sqlite:///here/mlflow.db", "sqlite:///./here/mlflow.db"])
def test_a_relative_database_is_the_same_one_from_elsewhere(inside, given, monkeypatch):
    folder = inside("my runs", "here/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    tracking.register(model_in(folder / "model"), "mine", "champion")
    monkeypatch.chdir("/")
    assert tracking.resolve("models:/mine@champion").is_relative_to(folder / "here")


@pytest.mark.parametrize("given", ["runs/mlflow.db", "./mlruns", "file:///tmp/mlruns"])
def test_a_folder_is_not_a_database(monkeypatch, given):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with pytest.raises(tracking.TrackingError, match=r"wants a database or a server, e\.g\. sqlite:////"):
        tracking.client()


def test_what_is_not_an_address(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[::1")
    with pytest.raises(tracking.TrackingError, match=r"MLFLOW_TRACKING_URI=http://\[::1: no MLflow server answers there"):
        tracking.client()


def test_a_server_that_does_not_answer_is_told_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(tracking.TrackingError, match=f"{uri}: no MLflow server answers there"):
        tracking.Run("experiment", "run")


def test_a_database_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(tracking.TrackingError, match=r"file/mlflow.db cannot be written"):
        tracking.client()


@pytest.mark.parametrize("given", [None, "sqlite:///runs/mlflow.db"])
def test_a_submitted_job_is_told_when_its_database_would_be_lost(monkeypatch, tmp_path, given):
    """Ray unpacks the working directory of a job like this, and leaves out the submitter's variables."""
    unpacked = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    unpacked.mkdir(parents=True)
    monkeypatch.chdir(unpacked)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given or "")
    with pytest.raises(tracking.TrackingError, match=r"Ray deletes.*--runtime-env-json '\{\"env_vars\""):
        tracking.client()
    assert not any(unpacked.iterdir())
    for path in ("runs", Path("runs/x"), unpacked / "a"):
        with pytest.raises(ConfigError, match=r"storage=.*which Ray deletes; give the full path"):
            check_lasting(path, "storage")
    for path in (tmp_path / "runs", "s3://bucket/runs", "/shared/runs"):
        check_lasting(path, "storage")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("name", ODD)
def test_configurations_take_any_folder_on_the_command_line_and_in_files(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "r.jsonl").write_text("{}\n")
    file = folder / "job.yaml"
    file.write_text("records: r.jsonl\nmodel: m\noutput: out\n")
    config = EvaluateConfig.load(file, [f"output={folder}/out", f"model={folder}"])
    assert (config.output, config.model, config.records) == (f"{folder}/out", str(folder), str(folder / "r.jsonl"))
    model_in(folder / "model")
    file.write_text("checkpoint: model\nname: x\n")
    assert RegisterConfig.load(file).checkpoint == str(folder / "model")
    file.write_text("model: x\n")
    assert ServeConfig.load(file, [f"model={folder}"]).model == str(folder)
