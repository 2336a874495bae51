import pytest
import torch
import torch.nn.functional as F

from molmo_core.nn.configs import LlmConfig
from molmo_core.nn.moe import MixtureOfExperts

CONFIG = LlmConfig(d_model=32, n_heads=2, n_layers=1, mlp_hidden_size=32, block_type="moe", moe_num_experts=6, moe_top_k=2)


def make(config: LlmConfig = CONFIG) -> MixtureOfExperts:
    moe = MixtureOfExperts(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def one_token_at_a_time(moe: MixtureOfExperts, x: torch.Tensor, top_k: int) -> torch.Tensor:
    """The definition, with the matrices of expert e taken out of the stacks."""
    mlp, hidden = moe.experts.mlp, CONFIG.intermediate_size
    results = []
    for token in x.flatten(0, 1):
        probabilities = F.softmax(moe.router.layer.weight @ token, dim=0)
        result = torch.zeros_like(token)
        for e in probabilities.argsort(descending=True)[:top_k].tolist():
            rows = slice(e * hidden, (e + 1) * hidden)
            inner = F.silu(mlp.w1[rows] @ token) * (mlp.v1[rows] @ token)
            result = result + probabilities[e] * (mlp.w2[rows].T @ inner)
        results.append(result)
    return torch.stack(results).view_as(x)


@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (3, 40)])
def test_equals_the_definition(shape):
    torch.manual_seed(0)
    moe, x = make(), torch.randn(*shape, 32)
    torch.testing.assert_close(moe(x)[0], one_token_at_a_time(moe, x, 2), atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_definition():
    torch.manual_seed(1)
    moe, x = make(), torch.randn(2, 5, 32)
    target = torch.randn_like(x)
    gradients = []
    for function in (lambda: moe(x)[0], lambda: one_token_at_a_time(moe, x, 2)):
        (function() * target).sum().backward()
        gradients.append({n: p.grad for n, p in moe.named_parameters()})
        moe.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_published_names():
    names = {n: tuple(p.shape) for n, p in MixtureOfExperts(CONFIG).named_parameters()}
    stacked = (6 * 16, 32)
    assert names == {
        "router.layer.weight": (6, 32),
        "experts.mlp.w1": stacked,
        "experts.mlp.v1": stacked,
        "experts.mlp.w2": stacked,
    }


def test_router_losses():
    moe = make()
    torch.nn.init.zeros_(moe.router.layer.weight)  # every expert equally probable
    losses = moe(torch.randn(1, 12, 32))[1]
    assert losses.load_balancing.item() == pytest.approx(1.0, abs=1e-6)
    assert losses.z.item() == pytest.approx(torch.tensor(6.0).log().square().item(), abs=1e-5)
    with torch.no_grad():
        moe.router.layer.weight[0] = 50.0  # all tokens of positive sum go to expert 0
    skewed = moe(torch.rand(1, 12, 32))[1]
    assert skewed.load_balancing.item() > 2.9  # half of the assignments, all of the probability
    skewed.load_balancing.backward()
    assert moe.router.layer.weight.grad is not None


def test_padding_counts_for_no_router_loss():
    torch.manual_seed(3)
    moe, x = make(), torch.randn(2, 7, 32)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    padded, real = moe(x, valid)[1], moe(x[valid][None])[1]
    torch.testing.assert_close(padded.load_balancing, real.load_balancing)
    torch.testing.assert_close(padded.z, real.z)
    assert not torch.allclose(padded.z, moe(x)[1].z)
    nothing = moe(x, torch.zeros_like(valid))[1]
    assert (nothing.load_balancing.item(), nothing.z.item()) == (0, 0)


@pytest.mark.parametrize("top_k", [1, 4])
def test_bfloat16_and_autocast(top_k):
    torch.manual_seed(2)
    config = LlmConfig(d_model=32, n_heads=2, n_layers=1, mlp_hidden_size=32, block_type="moe", moe_num_experts=6, moe_top_k=top_k)
    moe, x = make(config), torch.randn(2, 9, 32)
    exact = moe(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = moe(x)[0]
    assert mixed.dtype == torch.float32
    # A token whose two best experts are almost equal may choose another one; nearly all must agree.
    close = ((mixed - exact).norm(dim=-1) / exact.norm(dim=-1)) < 0.05
    assert close.float().mean() > 0.8
    assert moe.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
