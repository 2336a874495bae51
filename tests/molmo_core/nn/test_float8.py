"""Matrices in float8: what rounding costs, and layers that compute with them (the kernels: test_float8_gpu.py)."""

import pytest
import torch
import torch.nn.functional as F

from molmo_core.nn.float8 import Float8Linear, quantise
from molmo_core.nn.linear import Linear


def test_every_row_has_its_own_scale():
    torch.manual_seed(0)
    weight = torch.randn(64, 200) * torch.logspace(-6, 6, 64)[:, None]
    rounded, scales = quantise(weight)
    assert (rounded.dtype, rounded.shape, scales.dtype, scales.shape) == (torch.float8_e4m3fn, (64, 200), torch.float32, (64,))
    assert torch.equal(rounded.float().abs().amax(1), torch.full((64,), 448.0))
    back = rounded.float() * scales[:, None]
    assert ((back - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.04
    normal = weight.abs() > 2**-6 * scales[:, None]  # three bits behind the first one
    assert ((back - weight).abs() / weight.abs())[normal].max() <= 2**-4 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_any_size(dtype):
    largest = torch.finfo(dtype).max
    for weight in (torch.zeros(2, 16), torch.full((2, 16), largest), torch.eye(2, 16) * -largest, torch.full((2, 16), 1e-7)):
        rounded, scales = quantise(weight.to(dtype))
        back = rounded.double() * scales[:, None]
        torch.testing.assert_close(back, weight.to(dtype).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_none(wrong):
    weight = torch.ones(3, 16)
    weight[1, 2] = wrong
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)])
def test_a_layer_multiplies_by_what_was_rounded(shape, bias):
    torch.manual_seed(0)
    base = Linear(48, 32, bias=bias)
    layer = Float8Linear(base)
    x = torch.randn(shape)
    out = layer(x)
    torch.testing.assert_close(out, F.linear(x, layer.weight.float() * layer.scales[:, None], base.bias))
    assert out.shape == (*shape[:-1], 32)
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else []), "nothing to train, and of no float8 parameter"
    assert sum(t.nbytes for t in layer.buffers()) == 32 * 48 + 32 * 4
