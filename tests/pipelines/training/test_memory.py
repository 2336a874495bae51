"""Runs that cannot fit are refused with the numbers, before anything is allocated; the estimate is what torch really holds."""

from pathlib import Path

import pytest
import torch

from molmo_core.config import ConfigError
from pipelines import cluster
from pipelines.training.config import TrainConfig
from pipelines.training.memory import check_memory, memory_needed
from pipelines.training.optim import Optimizer, freeze

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def demo(*changes: str) -> TrainConfig:
    return TrainConfig.load(ROOT / "configs/train/demo.yaml", list(changes))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["precision=bf16"],
        ["ft_llm=false"],
        ["ft_vit=false", "ft_embedding=ln_f"],
        ["optim.llm.muon_lr=null", "optim.vit.muon_lr=null"],
        ["model.llm.weight_tying=true"],
    ],
    ids=str,
)
def test_the_estimate_is_what_a_step_leaves(changes):
    config = demo(*changes)
    model = config.model.build_model()
    model.to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    freeze(model, config)
    optimizer = Optimizer(model, config.optim)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step(torch.tensor(False))
    states = [t for o in optimizer.optimizers for state in o.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    need = memory_needed(config)
    assert need.parameters == sum(p.numel() for p in model.parameters())
    assert need.weights == sum(p.nbytes for p in model.parameters())
    assert need.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert need.optimizer == sum(t.nbytes for t in states)


def test_a_run_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(cluster, "free_memory", lambda: 24 * 10**9)
    large = ["model=configs/models/molmo-7b-d.yaml", "device=cpu"]
    monkeypatch.chdir(ROOT)
    config = TrainConfig.load(ROOT / "configs/train/finetune.yaml", large)
    with pytest.raises(ConfigError, match=r"at least 121\.8 GB: weights 32\.1 GB.*free memory of 24\.0 GB.*check_memory=false"):
        check_memory(config)
    check_memory(TrainConfig.load(ROOT / "configs/train/finetune.yaml", [*large, "check_memory=false"]))
    check_memory(demo())
    monkeypatch.setattr(cluster, "free_memory", lambda: 10**6)
    with pytest.raises(ConfigError, match=r"this machine's free memory of 0\.0 GB"):
        check_memory(demo())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")  # another cluster's machines
    check_memory(demo())


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CGROUP", tmp_path)
    everything = cluster.free_memory()
    assert everything > 10**6
    for name, text in {
        "memory.max": "3000000",
        "memory.current": "2500000",
        "memory.stat": "anon 1000000\ninactive_file 1500000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert cluster.free_memory() == 2_000_000
    (tmp_path / "memory.max").write_text("max")
    assert cluster.free_memory() > 10**6
