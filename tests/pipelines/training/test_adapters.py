"""Runs that train adapters only, in one process: what changes, what a checkpoint holds, that they resume."""

import pytest
import ray.train.torch
import torch
from batches import RandomLoader, tiny_config
from test_checkpointing import Recorder
from torch.distributed.checkpoint import FileSystemReader

from molmo_core.checkpoint import load_model
from molmo_core.config import ConfigError
from molmo_core.nn.lora import is_adapter
from pipelines.tracking import check_checkpoint
from pipelines.training import loop
from pipelines.training.config import CheckpointConfig, EmaConfig, LoraConfig
from pipelines.training.events import Done, Started


@pytest.fixture
def base(tmp_path):
    """A checkpoint to begin from."""
    torch.manual_seed(0)
    tiny_config(tmp_path).model.build_model().save_checkpoint(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def train(monkeypatch, tmp_path, base):
    """Trains adapters to a step; returns the start and the weights that came out."""
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("pipelines.training.preemption.ASK_S", float("inf"))  # here is no Ray Train to ask

    def train(name, steps, **changes):
        settings = {"init_from": str(base), "lora": LoraConfig(rank=4, alpha=8.0), "checkpoint": CheckpointConfig(interval=1, keep=None)}
        told = Recorder()
        loop.train(tiny_config(tmp_path, name=name, steps=steps, **(settings | changes)), RandomLoader, told)
        return told.only(Started), load_model(told.only(Done)[0].model).state_dict()

    return train


def test_only_adapters_are_trained_and_saved_and_a_run_resumes(train, base, tmp_path):
    _, undisturbed = train("undisturbed", 4)
    before = load_model(base).state_dict()
    assert before.keys() == undisturbed.keys()
    changed = {name: undisturbed[name] - weight for name, weight in before.items() if not torch.equal(undisturbed[name], weight)}
    assert "transformer.blocks.0.att_proj.weight" in changed
    assert all(name.startswith(("transformer.blocks.", "vision_backbone.")) for name in changed)
    for name, change in changed.items():
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4, name

    train("resumed", 2)
    started, resumed = train("resumed", 4)
    assert started == [Started(2)]
    assert all(torch.equal(resumed[name], weight) for name, weight in undisturbed.items())
    saved = FileSystemReader(tmp_path / "resumed/step_000004").read_metadata().state_dict_metadata
    parameters = [name for name in saved if name.startswith("model.")]
    assert len(parameters) == 2 * len(changed)
    assert all(is_adapter(name) for name in parameters), "what is not trained is not saved again and again"
    alone = load_model(tmp_path / "resumed/step_000004/adapters").state_dict()
    assert all(torch.equal(alone[name], weight) for name, weight in undisturbed.items())


def test_training_begins_from_adapters_and_the_registry_refuses_them(train, tmp_path):
    train("first", 1)
    adapters = tmp_path / "first/step_000001/adapters"
    _, second = train("second", 1, init_from=str(adapters))
    alone = load_model(tmp_path / "second/step_000001/adapters").state_dict()
    assert all(torch.equal(alone[name], weight) for name, weight in second.items())
    with pytest.raises(ConfigError, match=r"adapters; a version of a registered model is complete in itself"):
        check_checkpoint(adapters)


def test_averaged_adapters(train, tmp_path):
    _, averaged = train("averaged", 2, ema=EmaConfig(decay=0.5))
    alone = load_model(tmp_path / "averaged/step_000002/adapters").state_dict()
    assert all(torch.equal(alone[name], weight) for name, weight in averaged.items())
    _, last = train("last", 2)
    assert any(not torch.equal(averaged[name], weight) for name, weight in last.items())


def test_adapters_beside_float8(train):
    """The run is another one, slightly; what it trains, and what it leaves, is the same kind of thing."""
    _, exact = train("exact", 3)
    _, found = train("float8", 3, float8=True, activation_checkpointing="selective")
    name = "transformer.blocks.0.att_proj.weight"
    assert not torch.equal(found[name], exact[name])
    torch.testing.assert_close(found[name], exact[name], rtol=0.1, atol=0.05)


def test_what_adapters_need(tmp_path):
    with pytest.raises(ConfigError, match=r"init_from=CHECKPOINT is missing"):
        tiny_config(tmp_path, lora=LoraConfig())
    with pytest.raises(ConfigError, match="lora is for the parts"):
        tiny_config(tmp_path, lora=LoraConfig(), init_from="x", ft_connector=False, ft_vit=False, ft_llm=False)
