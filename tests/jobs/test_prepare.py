"""`python -m jobs.prepare` as a user runs it: what it leaves behind, what it does with bad records, and after being killed."""

from __future__ import annotations

import hashlib
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
from pipelines.cluster import connect
from pipelines.data.batches.prepared import PreparedDataset
from pipelines.data.config import PrepareConfig
from pipelines.data.preparation.prepare import prepare
from pipelines.data.rejects import TooManyRejected
from pipelines.data.sources import open_records
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.evaluate import evaluate

RECIPE = "configs/data/records.yaml"


@pytest.fixture(scope="module")
def cluster():
    with connect(num_cpus=2, object_store_memory=256 << 20):
        yield


def records(folder: Path, good: int, bad: int = 0) -> Path:
    """JSON lines with `good` usable records and `bad` ones, mixed; row k is bad if its image is missing."""
    rows = []
    for i in range(good + bad):
        missing = i % 3 == 1 and i // 3 < bad
        name = f"{'no' if missing else 'yes'}{i}.png"
        if not missing:
            pixels = np.random.RandomState(i).randint(0, 256, (24 + i % 7, 30, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name)
        rows.append({"image": name, "messages": [f"What is number {i}?", f"Noise {i}."], "id": i, "split": "train"})
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path: Path, output: Path, **kwargs) -> PrepareConfig:
    overrides = [f"records={path}", f"output={output}", *(f"{k}={v}" for k, v in kwargs.items())]
    return PrepareConfig.load(RECIPE, overrides)


def content(folder: Path) -> dict[str, str]:
    """Hash of every file that must not depend on how the run went (the others hold times)."""
    stable = [p for p in folder.rglob("*") if p.suffix in (".arrow", ".parquet", ".jsonl") or p.name == "tokenizer.json"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in stable}


def test_missing_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="records, output must be given"):
        prepare(PrepareConfig.load(RECIPE))
    with pytest.raises(ConfigError, match="no such file or folder"):
        prepare(config(tmp_path / "nothing.jsonl", tmp_path / "out"))


@pytest.mark.slow
def test_books_balance_and_rejects_are_listed(cluster, tmp_path):
    path = records(tmp_path, good=70, bad=9)
    report = prepare(config(path, tmp_path / "out", shard_rows=16))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (report["rows_in"], report["rows_out"], report["rows_rejected"]) == (79, 70, 9)
    assert report["rejected_by_reason"] == {"media: missing file": 9}
    assert report["fields_not_used"] == {"split": 79}
    assert "Fields not used" in (tmp_path / "out" / "report.html").read_text()
    assert report["seconds"] > 0
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert [row["row"] for row in rejected] == [1 + 3 * k for k in range(9)]
    assert {row["source"] for row in rejected} == {str(path)}
    assert all("no1" in row["detail"] or "no" in row["detail"] for row in rejected)

    dataset = PreparedDataset(tmp_path / "out")
    assert len(dataset) == 70
    assert [dataset[i]["metadata"]["id"] for i in range(70)] == sorted(set(range(79)) - {r["row"] for r in rejected})
    assert dataset.tokens.tolist() == [len(dataset[i]["input_ids"]) for i in range(70)]
    assert dataset.crops.tolist() == [1] * 70


@pytest.mark.slow
def test_held_out_records_are_evaluated(cluster, tiny_checkpoint, tmp_path):
    path = records(tmp_path, good=40)
    report = prepare(config(path, tmp_path / "out", shard_rows=16, actors=1, model=tiny_checkpoint, **{"split.test": 0.2}))
    held_out = open_records(str(tmp_path / "out/test.part.json"))
    assert report["rows_in"] + report["rows_held_out"] == 40
    assert len(PreparedDataset(tmp_path / "out")) == report["rows_out"] == 40 - len(held_out)
    settings = {"model": tiny_checkpoint, "records": tmp_path / "out/test.part.json", "output": tmp_path / "scores"}
    scores = evaluate(EvaluateConfig(**{k: str(v) for k, v in settings.items()}, max_new_tokens=3, workers=1)).figures
    assert scores["records"] == scores["questions"] == len(held_out)
    asked = pq.read_table(tmp_path / "scores/predictions").column("question").to_pylist()
    assert asked == [held_out[i].data["messages"][0] for i in range(len(held_out))]


@pytest.mark.slow
def test_a_bad_source_stops_the_run(cluster, tmp_path):
    path = records(tmp_path, good=60, bad=30)
    with pytest.raises(TooManyRejected, match=r"in.jsonl: \d+ of \d+ records rejected.*max_reject_rate=0.1.*missing file"):
        prepare(config(path, tmp_path / "out", shard_rows=10, max_reject_rate=0.1))
    assert pq.read_table(tmp_path / "out" / "rejected.parquet").num_rows > 10
    assert not (tmp_path / "out" / "report.json").exists()
    assert prepare(config(path, tmp_path / "out", shard_rows=10, max_reject_rate=0.5, actors=1))["rows_rejected"] == 30, (
        "a laxer limit continues"
    )


@pytest.mark.slow
def test_media_that_were_missing_are_tried_again(cluster, tmp_path):
    path = records(tmp_path, good=10, bad=130)
    with pytest.raises(TooManyRejected, match="they are tried again"):
        prepare(config(path, tmp_path / "out", shard_rows=20, max_reject_rate=0.2, actors=1))
    for row in map(json.loads, path.read_text().splitlines()):
        Image.new("RGB", (30, 20)).save(tmp_path / row["image"])
    assert prepare(config(path, tmp_path / "out", shard_rows=20, max_reject_rate=0.2, actors=1))["rows_out"] == 140


@pytest.mark.slow
def test_another_preparation_is_not_overwritten(cluster, tmp_path):
    path = records(tmp_path, good=5)
    report = prepare(config(path, tmp_path / "out"))
    assert prepare(config(path, tmp_path / "out")) == report, "nothing to do: the report stays"
    with pytest.raises(ConfigError, match=r"holds another preparation \(seed changed\)"):
        prepare(config(path, tmp_path / "out", seed=1))
    path.write_text(path.read_text().replace("Noise", "Voice"))
    with pytest.raises(ConfigError, match=r"holds another preparation \(the records changed\)"):
        prepare(config(path, tmp_path / "out"))


@pytest.mark.parametrize("wrong", ["shard_rows=0", "limit=-1", "max_image_pixels=1000000000", "format=prepared"])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
        PrepareConfig.load(RECIPE, [wrong])


@pytest.mark.slow
def test_killed_and_started_again(cluster, tmp_path):
    """SIGKILL of the whole job with some shards committed; the second start makes only the rest; the result is the undisturbed one."""
    path = records(tmp_path, good=300, bad=20)
    whole = prepare(config(path, tmp_path / "whole", shard_rows=8))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "jobs.prepare", RECIPE, f"records={path}", f"output={out}", "shard_rows=8", "actors=1"]
    job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, env={**os.environ, "RAY_ADDRESS": ""})
    deadline = time.monotonic() + 240
    while len(list(out.glob("shard-*.json"))) < 3:
        assert job.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(1)  # its Ray workers notice
    committed = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*.json")}
    assert 3 <= len(committed) < 40
    assert not (out / "report.json").exists()
    again = prepare(config(path, out, shard_rows=8))
    assert {k: again[k] for k in again if "second" not in k} == {k: whole[k] for k in whole if "second" not in k}
    assert content(out) == content(tmp_path / "whole")
    untouched = [p for p in out.glob("shard-*.json") if committed.get(p.name) == p.stat().st_mtime_ns]
    assert len(untouched) == len(committed), "committed shards were made again"
