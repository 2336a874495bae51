"""MLflow runs and the registry, on a sqlite database of the test's own."""

import multiprocessing
from pathlib import Path

import mlflow
import pytest
from PIL import Image

from molmo_core.config import ConfigError
from pipelines import tracking


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Creating the tables takes two seconds: once for the module."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("tracking")
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/sub/mlflow.db")
    tracking.client()
    yield folder
    patch.undo()


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "config.yaml").write_text("model_name: molmo\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_run_keeps_params_metrics_files_and_pictures(database):
    with tracking.Run("vision", "first") as run:
        run.log_params({"steps": 3, "optim": {"llm": {"lr": 1e-3}}, **{f"p{i}": i for i in range(120)}})
        for step in range(3):
            run.log_metrics({"loss": 3.0 - step, "lr/llm": 0.1}, step)
        run.log_picture(Image.new("RGB", (4, 4)), "samples/step_000003.png")
        run.log_picture(Image.new("RGB", (4, 4)), "loss.png")
    stored = run.client.get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["optim.llm.lr"] == "0.001"
    assert len(stored.data.params) == 122
    assert [(m.step, m.value) for m in run.client.get_metric_history(run.id, "loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert {a.path for a in run.client.list_artifacts(run.id)} == {"loss.png", "samples"}
    assert (database / "sub" / "mlartifacts" / "vision").is_dir()
    assert run.client.get_experiment_by_name("vision").tags == tracking.TRAINING_PAGES


def test_a_resumed_run_goes_on_and_keeps_its_parameters(database):
    run = tracking.Run("vision", "stopped")
    run.log_params({"steps": 3})
    with pytest.raises(RuntimeError), run:
        raise RuntimeError
    assert run.client.get_run(run.id).info.status == "FAILED"
    with tracking.Run("vision", "stopped", run_id=run.id) as again:
        again.log_params({"steps": 4, "new": 1})
    stored = run.client.get_run(run.id)
    assert (again.id, stored.info.status, stored.data.params) == (run.id, "FINISHED", {"steps": "3", "new": "1"})
    with pytest.raises(tracking.TrackingError, match="run unknown is not in sqlite"):
        tracking.Run("vision", "stopped", run_id="unknown")


def test_register_and_resolve(database, checkpoint):
    with tracking.Run("vision", "trained") as run:
        run.log_metrics({"loss": 0.5, "evaluation/shape": 0.5, "evaluation/overall": 0.987})
    first = tracking.register(checkpoint, "shapes", "champion", run.id)
    assert (first, tracking.resolve("models:/shapes@champion").name) == ("1", "checkpoint")
    (checkpoint / "model.safetensors").write_bytes(b"better weights")
    second = tracking.register(checkpoint, "shapes", "candidate")
    assert tracking.resolve("models:/shapes/1").joinpath("model.safetensors").read_bytes() == b"weights"
    assert tracking.resolve("models:/shapes@candidate").joinpath("model.safetensors").read_bytes() == b"better weights"
    tracking.client().set_registered_model_alias("shapes", "champion", second)
    assert tracking.resolve("models:/shapes@champion") == tracking.resolve("models:/shapes/2")
    version = tracking.client().get_model_version("shapes", "1")
    assert (version.run_id, version.description) == (run.id, "Evaluation: overall 98.7%, shape 50.0%")
    assert not tracking.client().get_model_version("shapes", second).description


def test_resolve_takes_a_folder_as_it_is(checkpoint):
    assert tracking.resolve(checkpoint) == checkpoint


def test_errors_say_what_there_is(database, checkpoint, tmp_path):
    tracking.register(checkpoint, "known", "champion")
    with pytest.raises(tracking.TrackingError, match=r"no registered model 'unknown' in sqlite.*There are: .*known"):
        tracking.resolve("models:/unknown@champion")
    with pytest.raises(tracking.TrackingError, match=r"'known' has no alias 'best'. There are: champion"):
        tracking.resolve("models:/known@best")
    with pytest.raises(tracking.TrackingError, match="version=7"):
        tracking.resolve("models:/known/7")
    with pytest.raises(tracking.TrackingError, match="model='a:b': "):
        tracking.resolve("models:/a:b@champion")
    with pytest.raises(tracking.TrackingError, match="models:/name@alias or models:/name/version"):
        tracking.resolve("models:/known")
    with pytest.raises(tracking.TrackingError, match="no such checkpoint folder"):
        tracking.resolve(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither config.yaml .* give the folder that holds one: .*final"):
        tracking.register(tmp_path, "known")


def test_artifacts_elsewhere_are_downloaded_once(database, checkpoint, monkeypatch, tmp_path):
    """A store that is not this machine's disk: the folder is fetched into runs/models."""
    version = tracking.register(checkpoint, "remote", "champion")
    place = tracking.resolve("models:/remote@champion")
    fetched = []

    def download(uri, dst_path):
        fetched.append(uri)
        (tmp_path / "got").mkdir()
        (tmp_path / "got" / "config.yaml").write_text("x: 1\n")
        return str(tmp_path / "got")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    monkeypatch.setattr(mlflow.MlflowClient, "get_model_version_download_uri", lambda *_: "s3://bucket/model")
    folders = [tracking.resolve("models:/remote@champion") for _ in range(2)]
    assert fetched == ["s3://bucket/model/data/checkpoint"]
    assert folders == [database / "runs" / "models" / "remote" / version] * 2
    assert place != folders[0]


def test_replicas_that_download_at_once_share_the_first_copy(database, checkpoint, monkeypatch, tmp_path):
    version = tracking.register(checkpoint, "shared")
    cache = database / "runs" / "models" / "shared" / version

    def download(uri, dst_path):
        for folder in (Path(dst_path) / "checkpoint", cache):  # another process ends its download first
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text("x: 1\n")
        return str(Path(dst_path) / "checkpoint")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    monkeypatch.setattr(mlflow.MlflowClient, "get_model_version_download_uri", lambda *_: "s3://bucket/model")
    assert tracking.resolve(f"models:/shared/{version}") == cache
    assert [path.name for path in cache.parent.iterdir()] == [version], "nothing else is left"


def _first_use(uri):
    import os

    os.environ["MLFLOW_TRACKING_URI"] = uri
    with tracking.Run("vision", "worker") as run:
        run.log_metrics({"loss": 1.0})
    return run.id


@pytest.mark.slow
def test_first_use_by_several_processes(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        runs = pool.map(_first_use, [f"sqlite:///{tmp_path}/mlflow.db"] * 3)
    assert len(set(runs)) == 3


def test_default_database_is_under_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"
