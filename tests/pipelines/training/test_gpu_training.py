"""The kernels of training, and that a step waits for nothing and compiles once. Runs on a GPU only."""

import pytest
import torch
from batches import RandomLoader, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from molmo_core.inputs import as_batch
from molmo_core.nn import loss
from molmo_core.nn.float8_training import float8_linear
from pipelines.training.adamw import AdamW
from pipelines.training.health import Health
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer, freeze
from pipelines.training.parallelize import use_float8
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


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs products in float8")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [64, 83])
def test_products_in_float8_are_those_of_the_cpu(rows, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(rows, 128), torch.randn(256, 128) / 8, torch.randn(256)]
    gradient, results = torch.randn(rows, 256).to(dtype), []
    for device in ("cpu", "cuda"):
        x, weight, bias = (t.to(device, dtype, copy=True).requires_grad_() for t in tensors)
        out = float8_linear(x, weight, bias)
        out.backward(gradient.to(device))
        results.append([t.detach().cpu().float() for t in (out, x.grad, weight.grad, bias.grad)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs products in float8")
def test_selective_recomputation_keeps_products_in_float8(tmp_path):
    config, counts = tiny_config(tmp_path, model=tiny_model(d_model=64, n_heads=4, n_kv_heads=2, head_dim=16)), {}
    model = config.model.build_model().cuda().bfloat16().train()
    use_float8(model, model.device)
    model.attention_implementation = "sdpa"  # not compiled here
    batch = as_batch(next(iter(RandomLoader(config.data, config.model, 4, 64, 0, 0, 1))), model.device)
    for policy in ("none", "selective", "full"):
        model.apply_activation_checkpointing(policy)
        with FlopCounterMode(display=False) as counter:
            model(**batch, return_logits=False).loss.backward()
        counts[policy] = counter.get_flop_counts()["Global"][torch.ops.aten._scaled_mm]
    assert counts["none"] == counts["selective"] < counts["full"]


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs products in float8")
def test_losses_in_float8_follow_those_in_bfloat16(tmp_path):
    curves = []
    for float8 in (False, True):
        config = tiny_config(tmp_path, precision="bf16", steps=100, model=tiny_model(d_model=64, n_heads=4, n_kv_heads=2, head_dim=16))
        torch.manual_seed(0)
        model = config.model.build_model().cuda().bfloat16()
        freeze(model, config)
        if float8:
            use_float8(model, model.device)
        model.train().apply_activation_checkpointing("selective")
        model.apply_compile()
        health = Health(config, model.device, lambda before: [], lambda event: None, lambda: "")
        step = TrainStep(config, model, Optimizer(model, config.optim), Meter(model, model.device), [health])
        loader = RandomLoader(config.data, config.model, 4, 64, 0, 0, 1)
        batches = [batch for batch, _ in zip(loader, range(60))]
        losses = [step(number, batch, loss_weight(batch), {}).step.loss.item() for number, batch in enumerate(batches, start=1)]
        curves.append(torch.tensor(losses))
    assert curves[0][-5:].mean() < 0.97 * curves[0][:5].mean(), "it learns"
    assert ((curves[1] - curves[0]).abs() / curves[0]).max() < 0.03
    assert not torch.equal(*curves)


@pytest.mark.parametrize(("precision", "float8"), [("bf16", False), ("amp_bf16", False), ("bf16", True), ("amp_bf16", True)])
def test_a_step_waits_for_nothing_and_compiles_once(tmp_path, precision, float8):
    from torch._dynamo.utils import counters

    wide = tiny_model(d_model=64, n_heads=4, n_kv_heads=2, head_dim=16)  # FlexAttention's kernels begin with heads of 16
    config = tiny_config(tmp_path, precision=precision, steps=100, model=wide)
    model = config.model.build_model().cuda()
    if precision == "bf16":
        model.bfloat16()
    freeze(model, config)
    if float8:
        use_float8(model, model.device)
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
