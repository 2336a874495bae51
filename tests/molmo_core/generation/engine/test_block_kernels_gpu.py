"""What is between the matrix products of a block, by kernels on a GPU: the numbers of the plain modules."""

import pytest
import torch

from molmo_core.generation.engine.paged import Stored
from molmo_core.nn.mlp import VitMlp, fused_swiglu
from molmo_core.nn.norm import RMSNorm
from molmo_core.nn.rope import apply_rotary

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def norm(size: int) -> RMSNorm:
    module = RMSNorm(size, 1e-6).cuda().bfloat16()
    torch.nn.init.normal_(module.weight)
    return module


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for a few values, whose sums are in another order and round differently."""
    error = (a.double() - b.double()).norm() / b.double().norm()
    return bool((a == b).float().mean() > 0.98 and error < 2e-3)


@pytest.mark.parametrize(("rows", "width"), [(1, 2560), (8, 2560), (300, 96), (3, 8192)])
def test_norm_and_swiglu(rows, width):
    from molmo_core.generation.engine.block_kernels import add_norm, swiglu

    torch.manual_seed(0)
    x, branch = torch.randn(2, rows, width, device="cuda", dtype=torch.bfloat16)
    module, total = norm(width), x + branch
    with torch.no_grad():
        assert near(add_norm(x, None, module.weight, 1e-6), module(x))
        assert near(add_norm(x, branch, module.weight, 1e-6), module(total))
        assert torch.equal(x, total)
        wide = torch.randn(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
        assert near(swiglu(wide), fused_swiglu(wide))


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 8, 128), (28, 4, 128), (16, 16, 64)])
@pytest.mark.parametrize("rows", [1, 7, 700])
@pytest.mark.parametrize(("normed", "scaled"), [(True, False), (False, False), (False, True)])
def test_rotated_and_stored(heads, kv_heads, width, rows, normed, scaled):
    from molmo_core.generation.engine.block_kernels import RotaryTable, rotate_and_store

    torch.manual_seed(0)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width, device="cuda", dtype=torch.bfloat16)
    parts = [
        t.unflatten(-1, (-1, width)).transpose(0, 1)[None]
        for t in qkv.clone().split((heads * width, kv_heads * width, kv_heads * width), 1)
    ]
    norms = norm(width), norm(width)
    keys, values = torch.zeros(2, 800, kv_heads, 16, width, device="cuda", dtype=torch.bfloat16)
    places = torch.randperm(800 * 16, device="cuda")[:rows]
    pages, offsets = places // 16, places % 16
    angles = torch.arange(50.0, device="cuda")[:, None] * torch.rand(width // 2, device="cuda")
    positions, scale = torch.randint(50, (rows,), device="cuda"), torch.rand(rows, device="cuda")
    with torch.no_grad():
        weights = (norms[0].weight, norms[1].weight) if normed else None
        table = RotaryTable(angles.cos(), angles.sin())
        q, k, v = rotate_and_store(qkv, weights, 1e-6, table, positions, scale if scaled else None, Stored(keys, values, pages, offsets))
        exact_q, exact_k = (module(t) if normed else t for module, t in zip(norms, parts))
        rotary = tuple(torch.cat((t[positions], t[positions]), -1)[None, None] for t in table)
        exact_v = parts[2] * scale[None, None, :, None].bfloat16() if scaled else parts[2]
        for mine, exact in ((q, apply_rotary(exact_q, rotary)), (k, apply_rotary(exact_k, rotary)), (v, exact_v)):
            assert near(mine.transpose(0, 1)[None], exact)
    assert torch.equal(keys[pages, :, offsets], k)
    assert torch.equal(values[pages, :, offsets], v)


def test_the_activation_joins_the_product():
    torch.manual_seed(0)
    mlp = VitMlp(1152, 4304, "gelu_pytorch_tanh").cuda().bfloat16()
    x = torch.randn(2, 300, 1152, device="cuda", dtype=torch.bfloat16)
    exact = torch.nn.functional.gelu(mlp.w1.double()(x.double()), approximate="tanh")
    exact = mlp.w2.double()(exact)
    mlp.bfloat16()
    with torch.inference_mode():
        fused = mlp(x)
    plain = mlp(x)
    errors = [((out.double() - exact).norm() / exact.norm()).item() for out in (fused, plain)]
    assert errors[0] < 1.1 * errors[1] < 0.01


def test_a_packet_is_opened():
    from molmo_core.generation.engine.block_kernels import open_step

    packet = torch.tensor([[1, 0, 3], [7, 8, 0], [17, 3, 1], [4, 5, 0], [6, 9, 9]], dtype=torch.int32, device="cuda")
    newest = torch.tensor([5, 21, 7, 0], device="cuda")
    text, special = torch.randn(20, 24, device="cuda").bfloat16(), torch.randn(4, 24, device="cuda").bfloat16()
    x, pages, offsets = open_step(packet, newest, text, special, 16)
    assert torch.equal(x, torch.stack((special[1], text[5], text[0])))
    assert pages.tolist() == [6, 5, 0]
    assert offsets.tolist() == [0, 2, 0]
