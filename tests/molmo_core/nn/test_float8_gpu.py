"""The kernels for matrices in float8, against the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from molmo_core.nn.float8 import Float8Linear
from molmo_core.nn.linear import Linear

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that converts float8"
)
SHAPES = [(2560, 4096), (2560, 9728), (6144, 2560), (19456, 2560), (4608, 3584), (512, 512), (192, 1152), (104, 48), (100, 60)]
"""Of matrices [out, in]: Molmo2-4B's, one of Qwen2-7B's, and such that fit no kernel."""


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def layer_of(out: int, columns: int, bias: bool, dtype: torch.dtype) -> tuple[Float8Linear, torch.Tensor]:
    """A layer, and its matrix in float64."""
    torch.manual_seed(0)
    layer = Float8Linear(Linear(columns, out, bias=bias, device="cuda", dtype=dtype))
    return layer, layer.weight.double() * layer.scales.double()[:, None]


@pytest.mark.parametrize(("out", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_number_of_rows(out, columns, dtype):
    layer, matrix = layer_of(out, columns, True, dtype)
    for rows in (1, 2, 7, 16, 17, 33, 64, 65, 128, 129, 256, 257, 1000):
        x = torch.randn(rows, columns, device="cuda", dtype=dtype)
        with torch.inference_mode():
            result = layer(x)
        assert (result.shape, result.dtype) == ((rows, out), dtype)
        exact = F.linear(x.double(), matrix, layer.bias.double())
        assert relative(result, exact) < (0.01 if dtype == torch.bfloat16 else 0.002), rows
        worst = (result.double() - exact).abs().amax(1) / exact.abs().amax(1)
        assert worst.max() < 0.02, "each row, not only on average"


@pytest.mark.parametrize(("out", "columns"), SHAPES)
def test_every_number_is_read_as_it_is(out, columns):
    """All that float8 has, subnormal ones and zeros of both signs included: one column at a time by a row with a single one."""
    from molmo_core.nn import float8_kernels, row_kernel

    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN
    weight = codes.repeat(-(-out * columns // len(codes)))[: out * columns].view(out, columns).cuda().view(torch.float8_e4m3fn)
    scales = torch.ones(out, device="cuda")
    exact = weight.to(torch.bfloat16)
    assert torch.equal(float8_kernels.dequantise(weight, scales, torch.bfloat16), exact)
    for column in (0, 1, columns // 2, columns - 1):
        x = torch.zeros(3, columns, device="cuda", dtype=torch.bfloat16)
        x[1, column] = 1
        if row_kernel.fits(weight):
            assert torch.equal(row_kernel.multiply(x[1], weight, scales), exact[:, column])
        if float8_kernels.fits(x, weight):
            result = float8_kernels.multiply(x, weight, scales)
            assert torch.equal(result[1], exact[:, column])
            assert not result[[0, 2]].any()


def test_the_same_twice():
    layer, _ = layer_of(2560, 9728, False, torch.bfloat16)
    for rows in (1, 8, 100, 300):
        x = torch.randn(rows, 9728, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(layer(x), layer(x))


def test_rows_that_are_not_contiguous():
    layer, matrix = layer_of(512, 512, False, torch.bfloat16)
    x = torch.randn(512, 4, device="cuda", dtype=torch.bfloat16).T
    for rows in (x, x[:1], x[None]):
        assert relative(layer(rows), F.linear(rows.double(), matrix)) < 0.01
