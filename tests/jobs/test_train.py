"""What a training starts Ray with."""

from __future__ import annotations

import json

import pytest

from jobs.train import cpus_needed
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


@pytest.mark.parametrize("cores", [2, 16, 128])
def test_streamed_records_are_decoded_on_all_cores(settings, cores):
    assert cpus_needed(settings("prepared"), cores) == 2
    assert cpus_needed(settings("records.jsonl"), cores) == cores
    assert cpus_needed(settings("prepared", "records.jsonl"), cores) == cores
    validation = ValidationConfig(data=settings.data("records.jsonl"))
    assert cpus_needed(settings("prepared", validation=validation), cores) == cores


def test_there_is_always_room_for_the_workers(settings):
    assert cpus_needed(settings("records.jsonl", num_workers=4), 2) == 5
    assert cpus_needed(settings("prepared", num_workers=3, cpus_per_worker=0.5), 16) == 3
