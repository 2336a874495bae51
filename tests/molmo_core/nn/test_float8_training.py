"""Products in float8: how near they are, what they leave alone, and that compiling and recomputing change nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from molmo_core.checkpoint import load_model
from molmo_core.nn.float8_training import E4M3, E5M2, float8_linear, quantised
from molmo_core.nn.linear import Linear
from molmo_core.nn.lora import LoraLinear


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def gradients(product, *inputs):
    """The result, and the gradients for a random one of it."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = product(*inputs)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize(("dtype", "near"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_a_scale_makes_the_largest_number_the_largest_of_the_type(dtype, near):
    torch.manual_seed(0)
    for size in (1e-6, 1.0, 1e6):
        x = size * torch.randn(64, 32)
        x8, scale = quantised(x, dtype)
        assert x8.float().abs().max() == torch.finfo(dtype).max
        large = x.abs() > x.abs().max() / 1000
        torch.testing.assert_close((x8.float() * scale)[large], x[large], rtol=near, atol=0)
    zeros, scale = quantised(torch.zeros(16, 16), dtype)
    assert scale > 0
    assert not zeros.float().any()
    for value in (torch.inf, torch.nan):
        x[3, 4] = value
        x8, scale = quantised(x, dtype)
        assert not (x8.float() * scale)[3, 4].isfinite(), "a step that is not finite is seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 64), (2, 19, 64)], ids=["rows of 16", "other rows"])
def test_products_and_gradients_are_near_the_exact_ones(shape, dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(32, 64).to(dtype) / 8, torch.randn(32).to(dtype)
    found, exact = gradients(float8_linear, x, weight, bias), gradients(torch.nn.functional.linear, x, weight, bias)
    for a, b, most in zip(found, exact, (0.04, 0.07, 0.07, 1e-6), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert error(a, b) < most
    x8, w8 = (t8.float() * scale for t8, scale in (quantised(x, E4M3), quantised(weight, E4M3)))
    torch.testing.assert_close(found[0].float(), x8 @ w8.t() + bias.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_autocast_gives_the_type_of_the_result_and_parameters_keep_theirs():
    x, weight = torch.randn(16, 32), torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out, of_x, of_weight = gradients(float8_linear, x, weight)
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_without_gradients_a_layer_is_the_exact_one():
    layer, x = Linear(32, 16), torch.randn(5, 32)
    with torch.no_grad():
        expected = layer(x)
        layer.float8 = True
        assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), expected)


def test_adapters_are_exact_beside_a_frozen_weight_in_float8():
    torch.manual_seed(0)
    base = Linear(32, 16)
    layer = LoraLinear(base, rank=4, scale=2.0)
    layer.reset_adapter()
    torch.nn.init.normal_(layer.lora_b)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    layer.float8 = True
    x = torch.randn(48, 32, requires_grad=True)
    out = layer(x)
    adapter = 2.0 * x @ layer.lora_a.t() @ layer.lora_b.t()
    torch.testing.assert_close(out, float8_linear(x, layer.weight, layer.bias) + adapter)
    out.square().sum().backward()
    assert layer.weight.grad is None
    gradient = 2 * out.detach()
    torch.testing.assert_close(layer.lora_b.grad, 2.0 * gradient.t() @ (x @ layer.lora_a.t()), rtol=1e-4, atol=1e-4)


@pytest.fixture
def model(golden):
    torch.manual_seed(0)
    model = load_model(golden / "molmo-qwen2-clip", torch.float32).train()
    model.apply_float8()
    return model


def step(model, ids):
    """The loss of a text, and the gradients of the language model's blocks."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids.roll(-1, 1), loss_masks=(ids >= 0).float()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.transformer.blocks.parameters())]


IDS = torch.arange(40).view(2, 20) + 3
IDS[1, 15:] = -1


def test_which_layers_compute_in_float8(model):
    names = {name for name, layer in model.named_modules() if getattr(layer, "float8", False)}
    parts = ("att_proj", "attn_out", "ff_proj", "ff_out")
    assert names == {f"transformer.blocks.{i}.{part}" for i in range(len(model.transformer.blocks)) for part in parts}


def test_recomputation_changes_nothing_and_selectively_multiplies_nothing_twice(model):
    expected, counts = None, {}
    for policy in ("none", "selective", "full"):
        model.apply_activation_checkpointing(policy)
        with FlopCounterMode(display=False) as counter:
            found = step(model, IDS)
        counts[policy] = counter.get_total_flops()
        expected = expected or [t.clone() for t in found]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), policy
    assert counts["none"] == counts["selective"] < counts["full"]


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_blocks_compile_without_a_break(model, policy):
    torch._dynamo.reset()
    model.apply_activation_checkpointing(policy)
    expected = [t.clone() for t in step(model, IDS)]
    for block in model.transformer.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for ids in (IDS, IDS[:, :17]):  # 40 rows, and 34
        found = step(model, ids)
        if ids is IDS:
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_sizes_that_have_no_products_are_refused(golden):
    model = load_model(golden / "molmo-qwen2-clip", torch.float32)
    model.transformer.blocks[1].attn_out = Linear(24, 64)
    with pytest.raises(ValueError, match=r"transformer.blocks.1.attn_out is \[64, 24\]: products need multiples of 16"):
        model.apply_float8()
