"""What a training decides before it starts."""

from __future__ import annotations

import json

import pytest

from jobs.train import streams_records
from pipelines.data.config import DataConfig
from pipelines.training.config import TrainConfig, ValidationConfig


@pytest.fixture
def settings(golden, tmp_path):
    """Trainings of prepared data and of records."""
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "dataset.json").write_text("{}")
    (tmp_path / "records.jsonl").write_text(json.dumps({"messages": ["Hello?", "Yes."]}) + "\n")
    model = str(golden / "molmo-qwen2-clip" / "config.yaml")

    def make(*names, **changes):
        (tmp_path / "train.yaml").write_text(json.dumps({"name": "x", "model": model, "data": of(*names).as_dict(), "steps": 1}))
        made = TrainConfig.load(tmp_path / "train.yaml")
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    def of(*names):
        return DataConfig.from_dict({"datasets": {name: {"path": str(tmp_path / name)} for name in names}})

    make.data = of
    return make


def test_streamed_records_are_found(settings):
    assert not streams_records(settings("prepared"))
    assert streams_records(settings("records.jsonl"))
    assert streams_records(settings("prepared", "records.jsonl"))
    assert streams_records(settings("prepared", validation=ValidationConfig(data=settings.data("records.jsonl"))))
