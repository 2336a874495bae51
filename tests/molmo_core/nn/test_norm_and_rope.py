import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from molmo_core.config import ConfigError
from molmo_core.nn.configs import LlmConfig
from molmo_core.nn.norm import RMSNorm
from molmo_core.nn.rope import apply_rotary, rotary_tables, scaled_frequencies

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3", "rope_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_factor": 8.0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0,
    "rope_attention_factor": 1.2079441541679836, "rope_original_max_position_embeddings": 8192,
}  # fmt: skip


def test_norm_weight_multiplies_after_the_cast():
    norm = RMSNorm(8, 1e-5).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8).to(torch.bfloat16) * 100
    exact = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(torch.bfloat16)
    assert torch.equal(norm(x), norm.weight * exact)
    assert norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_statistics_are_float32(dtype):
    """Squares of float16 values above 256 overflow, and bfloat16 sums of many squares stop growing; neither happens here."""
    x = torch.full((1, 4096), 300.0, dtype=dtype)
    assert torch.equal(RMSNorm(4096, 1e-6).to(dtype)(x), torch.ones_like(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert RMSNorm(4096, 1e-6)(x.float()).dtype == torch.float32


def test_rotation():
    config = LlmConfig(d_model=8, n_heads=1, n_layers=2, rope_theta=100.0)
    positions = torch.tensor([[0, 3, 7]])
    tables = rotary_tables(config, positions)
    assert tables[0] is tables[1]
    x = torch.randn(1, 1, 3, 8)
    rotated = apply_rotary(x, tables[0])
    for s, position in enumerate(positions[0].tolist()):
        for j in range(4):  # element j turns with element j + 4
            angle = position * 100.0 ** (-2 * j / 8)
            a, b = x[0, 0, s, j].item(), x[0, 0, s, j + 4].item()
            assert rotated[0, 0, s, j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
            assert rotated[0, 0, s, j + 4].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-5)


def test_rotation_is_float32_for_half_precision():
    """At position 30000 a bfloat16 angle would be off by whole turns."""
    config = LlmConfig(d_model=64, n_heads=1, n_layers=1, rope_theta=1e6)
    x = torch.randn(1, 1, 1, 64)
    table = rotary_tables(config, torch.tensor([[30011]]))[0]
    assert table[0].dtype == torch.float32
    torch.testing.assert_close(apply_rotary(x.bfloat16(), table), apply_rotary(x.bfloat16().float(), table).bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, {k: v for k, v in YARN.items() if k != "rope_attention_factor"}])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_scaling_agrees_with_transformers(scaling, head_dim):
    config = LlmConfig(d_model=4 * head_dim, n_heads=4, n_layers=1, rope_theta=500_000.0, **scaling)
    parameters = {"rope_theta": 500_000.0} | {k.removeprefix("rope_") if k != "rope_type" else k: v for k, v in scaling.items()}
    theirs = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=65536, rope_parameters=parameters
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, CPU)
    inverse, ours = scaled_frequencies(config, CPU)
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=0)
    assert ours == pytest.approx(factor)


def test_scaling_of_some_layers():
    config = LlmConfig(d_model=64, n_heads=1, n_layers=4, rope_theta=5e5, rope_scaling_layers=[1, 3], **YARN)
    plain = LlmConfig(d_model=64, n_heads=1, n_layers=1, rope_theta=5e5)
    positions = torch.arange(10)[None]
    tables = rotary_tables(config, positions)
    assert tables[0] is tables[2]
    assert tables[1] is tables[3]
    assert torch.equal(tables[0][0], rotary_tables(plain, positions)[0][0])
    assert not torch.equal(tables[1][0], tables[0][0])


def test_missing_setting_is_named():
    config = LlmConfig(d_model=64, n_heads=1, n_layers=1, rope_type="yarn")
    with pytest.raises(ConfigError, match=r"llm\.rope_factor"):
        rotary_tables(config, torch.arange(3)[None])
