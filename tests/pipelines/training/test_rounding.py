"""Stochastic rounding, and that a bfloat16 model learns with it."""

import copy

import pytest
import torch
from batches import RandomLoader, tiny_config

from pipelines.training.adamw import AdamW
from pipelines.training.config import GroupConfig, OptimConfig, ScheduleConfig
from pipelines.training.muon import Muon
from pipelines.training.optim import Optimizer, freeze
from pipelines.training.rounding import random_bits, rounded


def bits(count: int, seed: int = 1) -> torch.Tensor:
    return random_bits(torch.tensor(seed, dtype=torch.int32), torch.arange(count, dtype=torch.int32))


def test_random_bits_are_uniform_and_independent():
    some = bits(1 << 18)
    for shift in (0, 16):
        share = ((some >> shift) & 0xFFFF).float() / (1 << 16)
        assert share.mean().item() == pytest.approx(0.5, abs=0.005)
        assert share.var().item() == pytest.approx(1 / 12, rel=0.02)
    halves = torch.stack(
        [(some & 0xFFFF).float(), ((some >> 16) & 0xFFFF).float(), (some.roll(1) & 0xFFFF).float(), bits(1 << 18, 2).float()]
    )
    assert (torch.corrcoef(halves) - torch.eye(4)).abs().max() < 0.01
    assert torch.equal(some, bits(1 << 18))


@pytest.mark.parametrize("value", [1.001, -0.0200031, 3e-39])
def test_rounding_is_right_on_average(value):
    results = rounded(torch.full((1 << 18,), value), bits(1 << 18)).double()
    low, high = results.unique().tolist()
    assert low < value < high
    assert results.mean().item() == pytest.approx(value, abs=0.01 * (high - low))


def test_what_bfloat16_has_stays():
    values = torch.tensor([0.0, -1.0, 1.0078125, float("inf"), -float("inf"), float("nan")])
    for seed in range(20):
        torch.testing.assert_close(rounded(values, bits(6, seed)).float(), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_adamw_goes_where_torchs_goes(moments):
    """200 steps of 1e-5 with weight decay and a scale of the gradients: the mean way of the weights is that of float32."""
    torch.manual_seed(0)
    begin = torch.randn(64, 512).bfloat16()
    half, exact = torch.nn.Parameter(begin.clone()), torch.nn.Parameter(begin.float())
    ours = AdamW([{"params": [half], "group": "llm"}], lr=1e-5, weight_decay=0.1, moments=moments)
    theirs = torch.optim.AdamW([exact], lr=1e-5, weight_decay=0.1)
    ours.gradient_scales = {"llm": torch.tensor(0.5)}
    for _ in range(200):
        half.grad = (0.001 * torch.randn(64, 512) + 0.001 * begin).bfloat16()
        exact.grad = 0.5 * half.grad.float()
        ours.step()
        theirs.step()
    ways = [((p.detach().float() - begin.float()) * begin.sign()).mean().item() for p in (half, exact)]
    assert ways[0] == pytest.approx(ways[1], rel=0.08)  # of 32,768 weights, each a few roundings off
    assert ours.state[half]["exp_avg_sq"].dtype == moments
    assert ours.state[half]["step"] == 200


def test_a_step_that_is_left_out_changes_nothing():
    parameter = torch.nn.Parameter(torch.randn(8, 8).bfloat16())
    optimizer = AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [t.clone() for t in (parameter, *optimizer.state[parameter].values())]
    parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for new, old in zip((parameter, *optimizer.state[parameter].values()), before):
        assert torch.equal(new, old)


def test_loaded_moments_are_used_and_new_parameters_are_placed():
    """What a step remembers of the tensors it changes ends with `load_state_dict`, and when other parameters have gradients."""
    torch.manual_seed(0)
    begin = [torch.randn(64).bfloat16() for _ in range(2)]
    gradients = [[torch.randn(64).bfloat16() for _ in range(2)] for _ in range(3)]

    def run(weights, steps, state=None, optimizer=None, only_first=()):
        parameters = optimizer.param_groups[0]["params"] if optimizer else [torch.nn.Parameter(w.clone()) for w in weights]
        optimizer = optimizer or AdamW(parameters, lr=0.1)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients[step])):
                parameter.grad = None if step in only_first and number else gradient.clone()
            optimizer.step()
        return optimizer, [p.detach().clone() for p in parameters]

    optimizer, half = run(begin, [0, 1])
    state = copy.deepcopy(optimizer.state_dict())
    _, whole = run(begin, [0, 1, 2])
    other, _ = run(begin, [2, 2])  # has moments of its own, which the loaded ones replace
    for parameter, weight in zip(other.param_groups[0]["params"], half):
        parameter.data.copy_(weight)
    _, resumed = run(None, [2], state, other)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole))

    _, frozen = run(begin, [0, 1, 2], only_first=[1])
    assert not torch.equal(frozen[1], whole[1])
    assert torch.equal(frozen[0], whole[0])


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        AdamW([torch.nn.Parameter(torch.ones(2))])


def losses(tmp_path, precision: str, steps: int = 60, **settings: str) -> list[float]:
    """Of a tiny model on one batch, at a learning rate of 1e-5 for all matrices."""
    groups = {name: GroupConfig(lr=1e-5, warmup=0) for name in ("connector", "vit", "llm")}
    optim = OptimConfig(**groups, schedule=ScheduleConfig("constant"), max_grad_norm=None, **settings)
    config = tiny_config(tmp_path, precision=precision, optim=optim)
    torch.manual_seed(0)
    model = config.model.build_model().bfloat16()
    if precision == "fp32":
        model.float()
    freeze(model, config)
    optimizer = Optimizer(model.train(), config.optim)
    batch = next(iter(RandomLoader(config.data, config.model, 4, 64, 0, 0, 1)))
    values = []
    for _ in range(steps):
        loss = model(**batch, return_logits=False).loss
        loss.backward()
        optimizer.step(torch.tensor(False))
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def test_bfloat16_learns_at_1e_5(tmp_path):
    exact = losses(tmp_path, "fp32")
    stochastic, nearest = (losses(tmp_path, "bf16", rounding=rounding) for rounding in ("stochastic", "nearest"))
    fall = exact[0] - exact[-1]
    for a, b in zip(stochastic[9::10], exact[9::10]):
        assert exact[0] - a == pytest.approx(exact[0] - b, abs=0.1 * fall)
    assert exact[0] - nearest[-1] < 0.5 * fall


def test_muon_rounds_stochastically():
    torch.manual_seed(0)
    begin = torch.randn(16, 64).bfloat16()
    ways = []
    for stochastic in (True, False):
        parameter = torch.nn.Parameter(begin.clone())
        muon = Muon([parameter], lr=1e-3, stochastic=stochastic)
        for _ in range(50):
            parameter.grad = begin.clone()
            muon.step()
        ways.append(((begin.float() - parameter.detach().float()) * begin.sign()).mean().item())
    exact = torch.nn.Parameter(begin.float())
    muon = Muon([exact], lr=1e-3)
    for _ in range(50):
        exact.grad = begin.float()
        muon.step()
    way = ((begin.float() - exact.detach()) * begin.sign()).mean().item()
    assert ways[0] == pytest.approx(way, rel=0.05)
    assert ways[1] < 0.7 * way
