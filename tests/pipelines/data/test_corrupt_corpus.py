"""`python -m jobs.prepare` on records of which every second one is broken in another way: nothing is lost, nothing stops the run."""

import collections
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from molmo_core.models.base import BaseModelConfig
from pipelines.data.batches.prepared import PreparedDataset


def corpus(make, folder) -> tuple[list, dict[int, str]]:
    """(rows, reason of each bad one by its row): the corrupt corpus with good rows of every kind in between."""
    make.picture(folder / "0.png")
    make.picture(folder / "png.jpg", format="PNG")
    make.clip(folder / "clip.mp4")
    make.clip(folder / "mp4.avi", format="mp4")
    good = [
        make.chat("0.png"),
        make.chat("png.jpg"),
        make.chat(video="clip.mp4"),
        make.chat(video="mp4.avi"),
        make.chat(),
        {"image": "0.png", "message_list": [{"style": "demo", "question": f"{k}?", "answer": str(k)} for k in range(4)]},
    ]
    bad, reasons = make.corrupt_corpus(folder / "corrupt")
    rows = [row for i, broken in enumerate(bad) for row in ({**good[i % len(good)], "id": 2 * i}, broken)]
    return rows, {2 * i + 1: reason for i, reason in enumerate(reasons)}


@pytest.mark.slow
def test_rows_in_are_rows_out_and_rejected(make, golden, tmp_path):
    rows, expected = corpus(make, tmp_path)
    path = make.write_jsonl(tmp_path / "in.jsonl", rows)
    model = BaseModelConfig.load("configs/models/molmo2-4b.yaml", overrides=[f"llm.tokenizer.identifier={golden / 'tokenizer'}"])
    model.save(tmp_path / "model.yaml")
    command = [sys.executable, "-m", "jobs.prepare", "configs/data/records.yaml", f"records={path}", f"output={tmp_path / 'out'}"]
    command += [f"model={tmp_path / 'model.yaml'}", "tokenizer=null", "sequence_length=4096", "shard_rows=16", "max_reject_rate=1"]
    job = subprocess.run([*command, "actors=1"], env={**os.environ, "RAY_ADDRESS": ""}, capture_output=True, text=True, timeout=400)
    assert job.returncode == 0, job.stderr[-4000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["rows_in"], report["rows_out"], report["rows_rejected"]) == (len(rows), len(rows) - len(expected), len(expected))
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert {row["row"]: row["reason"] for row in rejected} == expected
    assert len(rejected) == len(expected)
    assert all(row["source"] == str(path) and row["detail"] for row in rejected)
    assert report["rejected_by_reason"] == collections.Counter(expected.values())
    assert all(f"rejected {n}: {reason}" in job.stdout for reason, n in report["rejected_by_reason"].items())

    dataset = PreparedDataset(tmp_path / "out")
    assert [dataset[i]["metadata"]["id"] for i in range(len(dataset))] == list(range(0, len(rows), 2))
    for i in range(len(dataset)):
        example = dataset[i]
        assert ("images" in example) == (rows[2 * i].keys() != {"messages", "id"})
        assert ("frame_times" in example["metadata"]) == ("video" in rows[2 * i])
        assert np.all(example["labels"][example["loss_masks"] > 0] >= 0)
