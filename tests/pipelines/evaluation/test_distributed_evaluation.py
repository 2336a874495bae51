"""A distributed evaluation: every record once, the same answers as the model alone, on any number of workers, killed or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from molmo_core.config import ConfigError
from pipelines import cluster
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.evaluate import Evaluation, evaluate

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture(scope="module")
def connected():
    with cluster.connect(num_cpus=3, object_store_memory=256 << 20):
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Ten pictures with two questions each; the sixth file is damaged."""
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.RandomState(0)
    lines = []
    for i in range(10):
        Image.fromarray(rng.randint(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
        asked = [{"style": "demo", "question": q, "answer": "x", "type": t} for q, t in (("what is it?", "what"), ("why?", "why"))]
        lines.append(json.dumps({"image": f"{i}.png", "message_list": asked}))
    (folder / "5.png").write_bytes(b"not an image")
    (folder / "records.jsonl").write_text("\n".join(lines))
    return folder / "records.jsonl"


def settings(checkpoint, records, output, **changes) -> dict:
    given = {"model": str(checkpoint), "records": str(records), "output": str(output), "max_new_tokens": 5, "shard_records": 3}
    return given | {"workers": 2} | changes


def config(*args, **changes) -> EvaluateConfig:
    return EvaluateConfig(**settings(*args, **changes))


def predictions(output):
    return pq.read_table(output / "predictions").to_pylist()


def comparable(report):
    return {key: value for key, value in report.figures.items() if key != "seconds"}


def test_a_killed_evaluation_continues_and_finds_the_same(connected, tiny_model, tiny_checkpoint, records, tmp_path):
    """One worker that is killed with its driver after some shards, then three; and two that nobody disturbs."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    file = tmp_path / "evaluate.yaml"
    file.write_text(json.dumps(settings(tiny_checkpoint, records, killed, workers=1, shard_records=1)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    with subprocess.Popen([sys.executable, "-m", "jobs.evaluate", file], env=environment, start_new_session=True) as job:
        while not list(killed.glob("predictions/*.parquet")):
            assert job.poll() is None
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGKILL)
    assert not (killed / "report.json").exists()
    left = Evaluation(config(tiny_checkpoint, records, killed, workers=3, shard_records=1))
    before = {path: path.stat().st_mtime_ns for path in killed.glob("predictions/*.parquet")}
    assert left.records_done == len(before) > 0
    report = left.run()
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was done is not done again"

    expected = evaluate(config(tiny_checkpoint, records, whole))
    assert comparable(report) == comparable(expected)
    assert predictions(killed) == predictions(whole)
    assert report.scores() == expected.scores()

    figures = expected.figures
    assert (figures["records"], figures["rejected"], figures["questions"]) == (10, 1, 18)
    assert figures["reasons"] == {"image: undecodable": 1}
    assert json.loads((whole / "report.json").read_text()) == figures
    rows = predictions(whole)
    assert [row["record"] for row in rows] == [i for i in range(10) for _ in range(1 if i == 5 else 2)], "each record once, in order"
    (bad,) = [row for row in rows if row["rejected"]]
    assert (bad["rejected"], bad["source"], bad["row"], bad["number"]) == ("image: undecodable", str(records), 5, None)
    assert "not an image" in bad["detail"]
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    for row in rows[:2] + rows[-2:]:
        example = preprocess({"image": records.parent / f"{row['record']}.png", "style": "demo", "question": row["question"]})
        assert row["prediction"] == tiny_model.generate(**example, max_new_tokens=5).text[0].strip()
    with Image.open(whole / "answers.png") as picture:
        assert picture.width > 500


def test_limit(connected, tiny_checkpoint, records, tmp_path):
    assert evaluate(config(tiny_checkpoint, records, tmp_path, limit=2, workers=1)).figures["questions"] == 4


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_that_could_be_scored_is_an_error(connected, tiny_checkpoint, tmp_path, count):
    lines = [json.dumps({"image": f"missing{i}.png", "question": "q", "answer": "a"}) for i in range(count)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    told = rf"{count} of {count} records rejected, more than max_reject_rate=0.01 allows \({count} x media: missing file"
    with pytest.raises(ConfigError, match=told):
        evaluate(config(tiny_checkpoint, tmp_path / "r.jsonl", tmp_path / "out", workers=1))
    for i in range(count):
        Image.new("RGB", (30, 20)).save(tmp_path / f"missing{i}.png")
    report = evaluate(config(tiny_checkpoint, tmp_path / "r.jsonl", tmp_path / "out", workers=1))
    assert report.figures["questions"] == count, "media that come late are asked for again"
