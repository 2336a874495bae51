"""Streamed by decode actors or prepared before: the demo's recipe learns the same from easy-VQA."""

import json
from pathlib import Path

import pytest
import ray.train.torch
import torch
from test_checkpointing import Recorder

from pipelines import cluster
from pipelines.data.batches.loader import TrainLoader
from pipelines.data.config import PrepareConfig
from pipelines.data.preparation import easy_vqa
from pipelines.data.preparation.prepare import prepare
from pipelines.training import loop
from pipelines.training.config import TrainConfig
from pipelines.training.events import Metrics

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[3] / "configs"


def test_easy_vqa_streamed_and_prepared_gives_the_same_losses(tmp_path, monkeypatch):
    """Both are trained in this process."""
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("pipelines.training.preemption.ASK_S", float("inf"))  # here is no Ray Train to ask
    records, prepared = tmp_path / "easy.jsonl", tmp_path / "easy"
    records.write_text("".join(json.dumps(record) + "\n" for record in easy_vqa.records("test")[:12]))
    found = []
    with cluster.connect(num_cpus=3, object_store_memory=256 << 20):
        prepare(PrepareConfig.load(CONFIGS / "data/easy_vqa.yaml", [f"records={records}", f"output={prepared}", "sequence_length=256"]))
        for path in (records, prepared):
            changes = [f"name=of_{path.name}", f"storage={tmp_path}", f"data.datasets.easy_vqa.path={path}", "data.actors=1"]
            changes += [f"model.llm.tokenizer.identifier={prepared}/tokenizer", "num_workers=1", "global_batch_size=4"]
            told = Recorder()
            loop.train(TrainConfig.load(CONFIGS / "train/demo.yaml", [*changes, "steps=3", "log_interval=1"]), TrainLoader, told)
            found.append([metrics.values["loss"] for metrics in told.only(Metrics)])
    streamed, from_shards = found
    assert len(streamed) == 3
    assert streamed == from_shards
