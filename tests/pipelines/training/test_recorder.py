"""MLflow that is away, slow or lost, behind a recorder: nothing waits for it and nothing is lost."""

import json
import socket
import threading
import time

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from pipelines import tracking
from pipelines.tracking import places
from pipelines.training import recorder as module
from pipelines.training.recorder import Recorder
from pipelines.training.storage import Storage


@pytest.fixture
def run(own_database, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    monkeypatch.setattr(module, "PATIENCE_S", 1.5)
    return tracking.Run("tests", "observed")


@pytest.fixture
def outage(monkeypatch):
    """An outage of the server: `begin()` and `end()`."""

    class Outage:
        away, asked = False, 0

        def begin(self):
            self.away = True

        def end(self):
            self.away = False

    state = Outage()
    for name in ("log_batch", "log_artifact", "set_terminated", "get_metric_history"):
        call = getattr(mlflow.MlflowClient, name)

        def guarded(*arguments, call=call, **settings):
            state.asked += 1
            if state.away:
                raise MlflowException("API request failed: connection refused")
            return call(*arguments, **settings)

        monkeypatch.setattr(mlflow.MlflowClient, name, guarded)
    return state


@pytest.fixture
def recorder(run, tmp_path):
    lines = []
    made = Recorder(run, Storage(str(tmp_path), "run"), lines.append)
    made.lines = lines
    return made


def logged(run):
    return [(m.step, m.value) for m in run.client.get_metric_history(run.id, "loss")]


def picture():
    return Image.new("RGB", (4, 4))


def until(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_is_logged_arrives_in_order_and_the_run_ends(recorder, run):
    for step in range(5):
        recorder.metrics(step, {"loss": 5.0 - step}, when=1000 + step)
    recorder.picture("samples/step_000004.png", picture)
    recorder.close("FINISHED")
    assert logged(run) == [(step, 5.0 - step) for step in range(5)]
    assert [a.path for a in run.client.list_artifacts(run.id, "samples")] == ["samples/step_000004.png"]
    assert run.client.get_run(run.id).info.status == "FINISHED"
    assert recorder.lines == []


def test_what_is_sent_twice_is_there_once(recorder, run):
    for _ in range(2):
        for step in range(3):
            recorder.metrics(step, {"loss": float("nan") if step == 2 else 1.0}, when=1000 + step)
    recorder.close("FINISHED")
    assert [step for step, _ in logged(run)] == [0, 1, 2]
    assert recorder.lines == []


@pytest.mark.parametrize("begin", [0, 3], ids=["from the start", "in the middle"])
def test_an_outage_is_said_once_and_what_waited_is_sent_afterwards(recorder, run, outage, monkeypatch, begin):
    monkeypatch.setattr(module, "WARN_S", 0.2)
    for step in range(8):
        if step == begin:
            until(lambda: not recorder._waiting())
            outage.begin()
        recorder.metrics(step, {"loss": float(step)}, when=1000 + step)
        recorder.look()
        time.sleep(0.06)
    until(lambda: recorder.look() or recorder.lines)
    assert "connection refused. Training continues" in recorder.lines[0]
    outage.end()
    until(lambda: recorder.look() or len(recorder.lines) > 1)
    assert recorder.lines[1:] == ["MLflow answers again, and has everything."]
    recorder.close("KILLED")
    assert logged(run) == [(step, float(step)) for step in range(8)]
    assert run.client.get_run(run.id).info.status == "KILLED"
    assert recorder.storage.read(module.UNSENT_METRICS) is None


def test_the_status_is_told_before_the_end(recorder, run):
    recorder.metrics(1, {"loss": 1.0}, when=1001)
    recorder.ends("KILLED")
    until(lambda: run.client.get_run(run.id).info.status == "KILLED")
    recorder.metrics(2, {"loss": 2.0}, when=1002)
    recorder.close("FINISHED")  # the step that was to be finished was the last one
    assert logged(run) == [(1, 1.0), (2, 2.0)]
    assert run.client.get_run(run.id).info.status == "FINISHED"


def test_at_the_end_the_rest_is_kept_and_sent_when_the_run_is_continued(recorder, run, outage, tmp_path):
    recorder.metrics(1, {"loss": 1.0}, when=1001)
    until(lambda: not recorder._waiting())
    outage.begin()
    recorder.metrics(2, {"loss": 2.0}, when=1002)
    recorder.picture("samples/step_000002.png", picture)
    recorder.picture("training.png", lambda: run.client.get_metric_history(run.id, "loss") and picture())
    recorder.close("FINISHED")
    assert f"3 entries were not sent; they are in {tmp_path}/run/unsent. " in recorder.lines[-1]
    assert (tmp_path / "run/unsent/samples/step_000002.png").is_file()
    step, values, _ = json.loads((tmp_path / "run" / module.UNSENT_METRICS).read_text())
    assert (step, values) == (2, {"loss": 2.0})
    outage.end()
    again = Recorder(tracking.Run("tests", "observed", run.id), recorder.storage, recorder.lines.append)
    again.metrics(3, {"loss": 3.0}, when=1003)
    again.close("FINISHED")
    assert logged(run) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not (tmp_path / "run" / module.UNSENT_METRICS).exists()


def test_a_server_that_never_answers_a_call_does_not_keep_the_end_waiting_for_ever(recorder, monkeypatch):
    silent = threading.Event()
    monkeypatch.setattr(tracking.Run, "log_metrics", lambda *_: silent.wait())
    recorder.metrics(1, {"loss": 1.0}, when=1001)
    recorder.close("FINISHED")
    assert "1 entries were not sent" in recorder.lines[-1]
    silent.set()


def test_memory_is_bounded_and_what_is_dropped_is_counted(recorder, run, outage, monkeypatch):
    monkeypatch.setattr(module, "MAX_METRICS", 3)
    outage.begin()
    for step in range(10):
        recorder.metrics(step, {"loss": float(step)}, when=1000 + step)
    assert recorder._waiting() <= 3
    outage.end()
    recorder.close("FINISHED")
    assert logged(run)[-3:] == [(7, 7.0), (8, 8.0), (9, 9.0)]
    assert any("entries are not in MLflow: more had to wait than are kept" in line for line in recorder.lines)


def test_pictures_that_cannot_be_drawn_and_entries_that_are_refused_cost_a_line(recorder, run):
    recorder.picture("samples/step_000001.png", lambda: 1 / 0)
    until(lambda: len(recorder.lines) == 1)
    recorder.run.log_metrics = _refused
    recorder.metrics(2, {"loss": 2.0}, when=1002)
    until(lambda: len(recorder.lines) == 2)
    del recorder.run.log_metrics
    recorder.metrics(3, {"loss": 3.0}, when=1003)
    recorder.close("FINISHED")
    assert sorted(recorder.lines) == ["MLflow refuses an entry: no such name", "samples/step_000001.png cannot be drawn: division by zero"]
    assert logged(run)[-1] == (3, 3.0)


def _refused(values, step, when):
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    raise MlflowException("no such name", error_code=INVALID_PARAMETER_VALUE)


def test_a_damaged_file_of_unsent_numbers_is_said(run, tmp_path):
    storage, lines = Storage(str(tmp_path), "run"), []
    storage.write(module.UNSENT_METRICS, '[1, {"loss":')
    Recorder(run, storage, lines.append).close("FINISHED")
    assert "metrics.jsonl is damaged and is not sent" in lines[0]


def test_a_server_that_is_not_there_or_does_not_speak_is_said(monkeypatch):
    monkeypatch.setattr(places, "CONNECT_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port, problem in ((9, "connection refused"), (silent.getsockname()[1], "takes too long")):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            with pytest.raises(tracking.TrackingError, match=f"MLFLOW_TRACKING_URI=http://127.0.0.1:{port}: no MLflow server.*{problem}"):
                tracking.Run("tests", "run")
