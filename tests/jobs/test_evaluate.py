"""The evaluation's table for people, and what happens when MLflow does not take a report."""

import json
import socket

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image
from typer.testing import CliRunner

from jobs.evaluate import app, describe, read_settings
from molmo_core.config import ConfigError
from pipelines import tracking
from pipelines.evaluation import evaluate
from pipelines.evaluation.report import PAGE, PICTURE, REPORT, finished_report
from pipelines.evaluation.results import claim, encode

TYPES = {
    "colour": {"questions": 1200, "metric": "vqa_score", "score": 0.5, "low": 0.47, "high": 0.53, "scores": {}},
    "pointing": {"questions": 9, "metric": "pointing", "score": 1, "low": 1, "high": 1, "scores": {}},
}
REPORT_OF_M = {
    "model": "m",
    "questions": 1200,
    "overall": 0.5,
    "low": 0.47,
    "high": 0.53,
    "types": TYPES,
    "records": 9,
    "rejected": 2,
    "reasons": {"image: undecodable": 2},
    "seconds": 1,
}


def test_the_table_adds_up_and_names_the_metrics():
    lines = describe(REPORT_OF_M).splitlines()
    assert [line.rsplit(maxsplit=6) for line in lines[1:4]] == [
        ["all but pointing", "1,200", "50.0%", "47.0%", "-", "53.0%", "mean"],
        ["colour", "1,200", "50.0%", "47.0%", "-", "53.0%", "vqa_score"],
        ["pointing", "9", "100.0%", "100.0%", "-", "100.0%", "pointing"],
    ]
    assert lines[4] == "2 of 9 records could not be used (2 x image: undecodable); see `rejected` in predictions/"
    without = describe(REPORT_OF_M | {"types": {"colour": TYPES["colour"]}, "rejected": 0}).splitlines()
    assert [line.split()[0] for line in without] == ["questions", "all", "colour"]


def test_pointing_alone():
    report = {"questions": 0, "overall": None, "low": None, "high": None, "types": {}, "records": 1, "rejected": 0}
    assert len(describe(report).splitlines()) == 1


@pytest.fixture
def evaluated(own_database, tmp_path, monkeypatch):
    """The arguments of an evaluation whose report is on disk, and that uses a database of its own."""
    output = tmp_path / "out"
    output.mkdir()
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.yaml").write_text("model_name: molmo\n")
    (tmp_path / "r.jsonl").write_text("{}\n")
    (output / REPORT).write_text(json.dumps(REPORT_OF_M | {"model": str(model)}))
    results = claim(output, {"shard_records": 64}, "m", "r", 1)
    results.commit(0, encode([{"record": 0, "number": 0, "score": 0.5}]))

    class Evaluated:
        """Of which nothing is left to do."""

        def __init__(self, _):
            self.report = finished_report(output, results)

        def run(self):
            return self.report

    Image.new("RGB", (4, 4)).save(output / PICTURE)
    (output / PAGE).write_text("<!doctype html>")
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"model: m\nrecords: r.jsonl\noutput: {output}\n")
    monkeypatch.setattr(evaluate, "Evaluation", Evaluated)
    return [str(config)]


def test_an_outage_after_the_work_loses_nothing_and_can_be_made_up_for(evaluated, tmp_path, monkeypatch):
    def down(*_, **__):
        raise MlflowException("database is gone")

    with monkeypatch.context() as outage:
        outage.setattr(mlflow.MlflowClient, "log_batch", down)
        outage.setattr(mlflow.MlflowClient, "set_terminated", down)
        result = CliRunner().invoke(app, evaluated)
    assert result.exit_code == 2
    assert "colour" in result.stdout, "the result is shown first"
    assert "the evaluation is done" in result.stderr
    assert "database is gone" in result.stderr
    assert "the same command with --record" in result.stderr
    assert "Traceback" not in result.output

    monkeypatch.setattr(evaluate, "Evaluation", lambda _: pytest.fail("evaluated again"))
    result = CliRunner().invoke(app, [*evaluated, "--record"])
    assert result.exit_code == 0, result.output
    run = tracking.client().get_run(result.stdout.split()[-1])
    assert run.data.metrics == {"evaluation/colour": 0.5, "evaluation/pointing": 1, "evaluation/overall": 0.5}
    assert {a.path for a in tracking.client().list_artifacts(run.info.run_id, "evaluation")} == {
        f"evaluation/{REPORT}",
        f"evaluation/{PAGE}",
        f"evaluation/{PICTURE}",
        "evaluation/predictions",
    }
    (shard,) = tracking.client().list_artifacts(run.info.run_id, "evaluation/predictions")
    assert shard.path.endswith("shard-000000.parquet")


def test_there_must_be_a_report_of_this_model(evaluated, tmp_path):
    for change, told in (("model=other", "/m, not of other"), (f"output={tmp_path}/nowhere", "no evaluation there")):
        result = CliRunner().invoke(app, [*evaluated, change, "--record"])
        assert result.exit_code == 2
        assert told in result.stderr


def test_a_wrong_address_is_told_before_the_work(evaluated, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(evaluate, "Evaluation", lambda _: pytest.fail("began"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    result = CliRunner().invoke(app, evaluated)
    assert result.exit_code == 2
    assert f"http://127.0.0.1:{port}: no MLflow server answers there" in result.stderr


def test_two_settings_are_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = read_settings("model=runs/a/model", ["records=s3://bucket/in/test.jsonl"])
    assert (settings.model, settings.records, settings.metric) == ("runs/a/model", "s3://bucket/in/test.jsonl", None)
    assert settings.output == "runs/evaluations/a-model on test"
    assert read_settings("model=models:/mine@champion", ["records=t.json", "limit=3"]).output == "runs/evaluations/mine@champion on t"
    assert read_settings("model=m", ["records=t.json", "output=there"]).output == "there"
    with pytest.raises(ConfigError, match="records"):
        read_settings("model=m", [])
    with pytest.raises(ConfigError, match="metric: no metric is called 'vqa'"):
        read_settings("model=m", ["records=t.json", "metric=vqa"])
    (tmp_path / "a=b.yaml").write_text("model: m\nrecords: r\noutput: o\n")
    assert read_settings("a=b.yaml", ["model=n"]).model == "n", "a file whose name has a sign in it"
    result = CliRunner().invoke(app, ["model=m", "records=nowhere.jsonl"])
    assert result.exit_code == 2
    assert "nowhere.jsonl" in result.stderr
