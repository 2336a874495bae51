"""The kernels of training, and that a step waits for nothing and compiles once. Runs on a GPU only."""

import pytest
import torch
from batches import RandomLoader, tiny_config, tiny_model

from molmo_core.nn import loss
from pipelines.training.adamw import AdamW
from pipelines.training.health import Health
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer, freeze
from pipelines.training.step import TrainStep, loss_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = [(3, 1024), (5000,), (7,), (64, 65), (128, 4096)]


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_adamw_on_the_gpu_is_that_on_the_cpu(moments):
    torch.manual_seed(0)
    begin, gradients = ([torch.randn(size).bfloat16() for size in SIZES] for _ in range(2))
    results = []
    for device in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(t.to(device, copy=True)) for t in begin]
        optimizer = AdamW([{"params": parameters, "group": "llm"}], lr=1e-3, weight_decay=0.1, moments=moments)
        optimizer.gradient_scales = {"llm": torch.tensor(0.5, device=device)}
        for _ in range(3):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient.to(device)
            optimizer.step()
        states = [optimizer.state[p] for p in parameters]
        results.append([*(p.detach().cpu() for p in parameters), *(s[name].cpu() for s in states for name in ("exp_avg", "exp_avg_sq"))])
    for a, b in zip(*results):  # the random bits are the same; float32 may differ in its last bits
        if a.dtype == torch.bfloat16:
            assert (a != b).float().mean() < 0.01
            torch.testing.assert_close(a, b, rtol=0.01, atol=1e-6)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_norms(tmp_path):
    config = tiny_config(tmp_path, precision="bf16")
    model = config.model.build_model().cuda().bfloat16()
    freeze(model, config)
    optimizer = Optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for group, square in optimizer.squared_norms().items():
        exact = sum(p.grad.double().square().sum() for p in optimizer.parameters[group])
        assert square.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("columns", [1000, 20000])
def test_rows_of_logits(columns):
    torch.manual_seed(0)
    logits, labels, weights = 3 * torch.randn(7, columns), torch.randint(0, columns, (7,)), torch.rand(7)
    labels[1], labels[3], weights[3] = logits[1].argmax(), -1, 0
    exact, gradient = loss._rows(logits, labels, weights, 0.01, True)
    found, ours = loss._rows(logits.cuda(), labels.cuda(), weights.cuda(), 0.01, True)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.cpu(), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "amp_bf16"])
def test_a_step_waits_for_nothing_and_compiles_once(tmp_path, precision):
    from torch._dynamo.utils import counters

    wide = tiny_model(d_model=64, n_heads=4, n_kv_heads=2, head_dim=16)  # FlexAttention's kernels begin with heads of 16
    config = tiny_config(tmp_path, precision=precision, steps=100, model=wide)
    model = config.model.build_model().cuda()
    if precision == "bf16":
        model.bfloat16()
    freeze(model, config)
    model.train().apply_compile()
    health = Health(config, model.device, lambda before: [], lambda event: None, lambda: "")
    step = TrainStep(config, model, Optimizer(model, config.optim), Meter(model, model.device), [health])
    batches = [batch for batch, _ in zip(RandomLoader(config.data, config.model, 4, 64, 0, 0, 1), range(12))]
    for number, batch in enumerate(batches[:9], start=1):
        step(number, batch, loss_weight(batch), {})
    torch.cuda.synchronize()
    graphs = counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(batches[9:], start=10):
            taken = step(number, batch, loss_weight(batch), {})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == graphs
    assert torch.isfinite(taken.step.loss)
