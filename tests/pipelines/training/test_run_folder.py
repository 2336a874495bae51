"""The folder of a run: who may run in it, and what is left there when a run cannot begin."""

import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray
import torch
from batches import tiny_config
from mlflow.exceptions import MlflowException

from molmo_core.config import ConfigError
from pipelines import tracking
from pipelines.data.config import DataConfig
from pipelines.training.provenance import git_revision
from pipelines.training.run_folder import RUN_FILE, RunFolder
from pipelines.training.trainer import run_training

ROOT = Path(__file__).parents[3]


pytestmark = pytest.mark.usefixtures("own_database")


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from batches import tiny_config
from pipelines.training.run_folder import RunFolder
with RunFolder(tiny_config(sys.argv[2], name="twice")).lock():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("storage", ["{}", "s3://bucket/runs?region=us-east-1"])
def test_a_second_training_is_refused_until_the_first_has_died(tmp_path, storage, monkeypatch):
    storage = storage.format(tmp_path)
    command = [sys.executable, "-c", HOLD, str(Path(__file__).parent), storage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = tiny_config("-", name="twice")
    config.storage = storage
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "held\n"
            message = rf"/twice: another training of this name runs \(process {first.pid} on \S+, since 20..-.*name=\.\.\."
            with pytest.raises(ConfigError, match=message):
                run_training(config)
            assert not ray.is_initialized(), "it is told before a cluster starts"
            with RunFolder(tiny_config(tmp_path, name="other")).lock():
                pass
        finally:
            first.send_signal(signal.SIGKILL)
    with RunFolder(config).lock():
        pass


def test_a_run_that_cannot_begin_leaves_its_folder_free(tmp_path, monkeypatch):
    """Refused by MLflow after the run was made there: the folder can be used with other settings afterwards."""
    config = tiny_config(tmp_path, name="run")
    with monkeypatch.context() as patch:
        patch.setattr(tracking.Run, "log_params", _refused)
        with pytest.raises(ConfigError, match=r"MLflow \(sqlite.*refuses the run 'run': no such name"):
            RunFolder(config).open_run()
    assert not (tmp_path / "run" / RUN_FILE).exists()
    runs = tracking.client().search_runs([tracking.client().get_experiment_by_name("tests").experiment_id])
    assert [run.info.status for run in runs] == ["FAILED"]
    config.seed = 1
    RunFolder(config).open_run().finish()


def _refused(self, params):
    raise MlflowException("no such name")


@pytest.mark.parametrize("dataset", ["vqa@v2", "a b", "ä", "x" * 400, "a/b", "a.b", "#%&"])
def test_any_name_of_a_dataset_can_be_logged(tmp_path, dataset):
    config = tiny_config(tmp_path, name="run", data=DataConfig.new(datasets={dataset: {"path": "-"}}))
    run = RunFolder(config).open_run()
    run.finish()
    params = run.client.get_run(run.id).data.params
    assert "-" in [value for key, value in params.items() if key.startswith("data.datasets") or "sha" in key]
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["mlflow_run"] == run.id
    assert RunFolder(config).open_run().id == run.id


def test_a_lost_tracking_database_does_not_forbid_to_continue(empty_database, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, name="run")
    first = RunFolder(config).open_run()
    shutil.copy(empty_database, tmp_path / "new.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    folder = RunFolder(config)
    second = folder.open_run()
    assert second.id != first.id
    assert re.search(f"run {first.id} is not in .*new.db.*from here on is in a new run", folder.notes[0])
    assert RunFolder(config).open_run().id == second.id


def test_other_settings_and_damage_are_refused(tmp_path):
    RunFolder(tiny_config(tmp_path, name="run")).open_run().finish()
    with pytest.raises(ConfigError, match=r"(?s)run with other settings.*seed: 6198 then, 1 now"):
        RunFolder(tiny_config(tmp_path, name="run", seed=1)).check()
    (tmp_path / "run" / RUN_FILE).write_text('{"mlflow')
    with pytest.raises(ConfigError, match=r"run/run.json is damaged"):
        RunFolder(tiny_config(tmp_path, name="run")).open_run()


def test_a_storage_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"storage: nowhere://x: .*nowhere"):
        RunFolder(tiny_config("nowhere://x", name="run"))
    for storage in ("/proc/x", "/sys/x", tmp_path / "file"):
        (tmp_path / "file").touch()
        with (
            pytest.raises(ConfigError, match=rf"storage: {storage}/run cannot be written: "),
            RunFolder(tiny_config(storage, name="run")).lock(),
        ):
            pass


def test_what_mlflow_would_refuse_is_told_before_the_run_has_a_folder(tmp_path, monkeypatch):
    """And before Ray starts: in the time that the test has."""
    client = tracking.client()
    client.delete_experiment(client.create_experiment("gone"))
    for experiment, address, told in (
        ("gone", f"sqlite:///{tmp_path}/mlflow.db", "'gone' was deleted"),
        ("tests", "http://127.0.0.1:9", "no MLflow server answers there"),
        ("tests", f"sqlite:///{tmp_path}/mlflow.db/inside", "cannot be written"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(ConfigError, match=told):
            run_training(tiny_config(tmp_path / "runs", experiment=experiment))
        assert not (tmp_path / "runs").exists()
        assert not ray.is_initialized()


def test_a_server_of_another_kind_is_refused(tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match="not a working MLflow server"):
            RunFolder(tiny_config(tmp_path)).check_tracking()
        server.shutdown()


def test_a_run_knows_where_its_results_come_from(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset.json").write_text("{}")
    (data / "report.json").write_text('{"rows_in": 3}')
    run = RunFolder(tiny_config(tmp_path, name="run", data=DataConfig.new(datasets={"mine": {"path": str(data)}}))).open_run()
    run.finish()
    assert {file.path for file in run.client.list_artifacts(run.id)} == {"config.yaml", "data", "environment.json"}
    folder = Path(run.client.download_artifacts(run.id, "", str(tmp_path)))
    assert (folder / "data/mine/report.json").read_text() == '{"rows_in": 3}'
    known = json.loads((folder / "environment.json").read_text())
    assert known["packages"]["torch"] == torch.__version__
    assert run.client.get_run(run.id).data.tags.get("mlflow.source.git.commit") == git_revision()
    assert git_revision(tmp_path) is None
