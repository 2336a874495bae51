import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from molmo_core.nn.attention import Cached, SequenceLayout, Whole
from molmo_core.nn.configs import LlmConfig
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import Pass, TokenEmbedding, Transformer

BASE = LlmConfig(
    d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, mlp_hidden_size=64, vocab_size=50, additional_vocab_size=8, rope_theta=1e4
)
YARN = {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_max_position_embeddings": 16, "rope_scaling_layers": [1]}
STYLES = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"attention_layer_norm": True, "attention_layer_norm_type": "qwen3", "head_dim": 16, "weight_tying": True},
    "olmo": {"attention_layer_norm": True, "norm_after": True, "n_kv_heads": None},
    "olmo3": {"attention_layer_norm": True, "norm_after": True, **YARN},
    "llama": {"block_type": "llama"},
    "olmoe": {"block_type": "moe", "moe_num_experts": 4, "moe_top_k": 2, "attention_layer_norm": True, "clip_qkv": 3.0},
}


def make(style: str = "qwen2", **changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(BASE, **{**STYLES[style], **changes})).eval()
    model.reset_parameters()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def run(model: Transformer, ids: torch.Tensor, positions=None, mask=None, cache=None, **inputs) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    tokens = Pass(model.first_hidden(model.wte(ids)), positions, **inputs)
    attention = Whole(mask) if cache is None else Cached(cache, Whole(mask))
    return model.logits(model.run_blocks(tokens, attention).hidden)


def test_embedding_is_one_table_in_two_parts():
    wte = TokenEmbedding(BASE)
    for parameter in wte.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[0, 49, 50, 57]])
    assert torch.equal(wte(ids), torch.cat((wte.embedding, wte.new_embedding))[ids])
    wte(ids).sum().backward()
    assert wte.embedding.grad.sum(1).tolist() == [32.0] + [0.0] * 48 + [32.0]
    assert wte.new_embedding.grad.sum(1).tolist() == [32.0] + [0.0] * 6 + [32.0]


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=5, deadline=None)
@given(cuts=st.sets(st.integers(1, 11), max_size=4))
def test_cached_equals_uncached(style, cuts):
    """However a sequence is cut into calls, the logits are those of one call."""
    model = make(style)
    ids = torch.randint(0, 58, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = run(model, ids)
        cache, parts = KVCache(), []
        for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 12]):
            mask = SequenceLayout().mask(2, b, b - a, torch.device("cpu"), "sdpa")
            parts.append(run(model, ids[:, a:b], torch.arange(a, b).expand(2, -1), mask, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_packed_equals_separate(style, lengths):
    model = make(style)
    ids = torch.randint(0, 58, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    segments = torch.cat([torch.full((n,), 100_000 * i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = run(model, ids, positions, SequenceLayout(segments=segments).dense_mask(1, ids.shape[1]))
        separate = torch.cat([run(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("style", ["qwen2", "olmoe"])
def test_recomputation_gives_the_same_gradients(style):
    model = make(style, residual_dropout=0.1).train()
    ids, gradients = torch.randint(0, 58, (2, 9)), []
    for policy in ("none", "selective", "full"):
        for block in model.blocks:
            block.recompute = policy
        model.zero_grad()
        torch.manual_seed(5)
        run(model, ids).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b, c in zip(*gradients):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


def test_selective_recomputation_multiplies_no_matrix_twice():
    model, counts = make("qwen2").train(), {}
    for policy in ("none", "selective", "full"):
        for block in model.blocks:
            block.recompute = policy
        with FlopCounterMode(display=False) as counter:
            run(model, torch.randint(0, 58, (2, 9))).logsumexp(-1).sum().backward()
        counts[policy] = counter.get_total_flops()
    assert counts["none"] == counts["selective"] < counts["full"]


def test_recomputation_refuses_a_cache():
    """It would be filled twice."""
    model = make().train()
    for block in model.blocks:
        block.recompute = "full"
    with pytest.raises(ValueError, match="activation checkpointing"):
        run(model, torch.ones(1, 4, dtype=torch.int64), cache=KVCache())
    with torch.no_grad():
        run(model, torch.ones(1, 4, dtype=torch.int64), cache=(cache := KVCache()))
    assert cache.length == 4


def test_blocks_share_a_compiled_graph():
    """Neither the number of a layer nor the attention object is part of what a graph is compiled for."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = make(n_layers=6)
    ids = torch.randint(0, 50, (2, 16))
    layout = SequenceLayout(valid=torch.arange(16) < torch.tensor([[16], [9]]))
    expected = [run(model, ids), run(model, ids, mask=layout.dense_mask(2, 16))]
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    counters.clear()
    found = [run(model, ids), run(model, ids, mask=layout.dense_mask(2, 16))]
    found.append(run(model, ids, mask=SequenceLayout(valid=torch.ones(2, 16, dtype=torch.bool)).dense_mask(2, 16)))
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == 2  # without and with a mask
    torch.testing.assert_close(found[:2], expected)


def test_attention_from_outside():
    """The blocks take any callable: here one that sees every layer once, in order, and only the token itself."""
    model, seen = make(n_layers=3), []

    def itself(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((layer, q.shape, k.shape, v.shape))
        return v.repeat_interleave(2, dim=1)

    ids = torch.randint(0, 50, (2, 5))
    with torch.no_grad():
        x = model.run_blocks(Pass(model.wte(ids), torch.arange(5).expand(2, -1)), itself).hidden
        expected = run(model, ids, mask=torch.eye(5, dtype=torch.bool)[None, None])
    torch.testing.assert_close(model.logits(x), expected)
    assert seen == [(layer, (2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)) for layer in range(3)]


def test_llama_blocks_equal_fused_ones():
    fused, split = make("qwen2", qkv_bias=False), make("llama")
    state = {}
    for name, tensor in fused.state_dict().items():
        if name.endswith("att_proj.weight"):
            for part, rows in zip("qkv", tensor.split(fused.blocks[0].widths)):
                state[name.replace("att_proj", f"{part}_proj")] = rows
        elif name.endswith("ff_proj.weight"):
            up, gate = tensor.chunk(2)
            state[name.replace("ff_proj", "ff_proj1")], state[name.replace("ff_proj", "ff_proj2")] = gate, up
        else:
            state[name] = tensor
    split.load_state_dict(state)
    ids = torch.randint(0, 58, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(run(split, ids), run(fused, ids), atol=1e-5, rtol=1e-5)


def test_value_scale():
    """A token of scale 0 is seen (it takes its share of the attention) but says nothing."""
    model = make(n_layers=1)
    ids = torch.randint(0, 50, (1, 6))
    with torch.no_grad():
        plain, ones = run(model, ids), run(model, ids, scale=torch.ones(1, 6))
        scale = torch.ones(1, 6)
        scale[0, 2] = 0.25
        scaled = run(model, ids, scale=scale)
    torch.testing.assert_close(ones, plain)
    torch.testing.assert_close(scaled[:, :2], plain[:, :2])
    assert (scaled[:, 2:] - plain[:, 2:]).abs().amax(-1).min() > 1e-3


def test_response_dropout():
    model = make(response_residual_dropout=1 - 1e-9, n_layers=1).train()
    ids, response = torch.randint(0, 50, (1, 6)), torch.tensor([[False, False, True, True, False, True]])
    expected = run(make(n_layers=1), ids)
    with torch.no_grad():
        # A branch that is (almost surely) dropped leaves the embedding: only the tokens of the answer change.
        dropped = run(model, ids, response=response)
        bare = model.logits(model.wte(ids))
    torch.testing.assert_close(dropped[response], bare[response])
    torch.testing.assert_close(dropped[:, :2], expected[:, :2])
    with pytest.raises(ValueError, match="response_mask"):
        run(model, ids)


def test_dropout_keeps_the_mean():
    model = make(residual_dropout=0.5, response_residual_dropout=0.25, n_layers=1).train()
    block = model.blocks[0]
    x, response = torch.ones(1, 2, 200_000), torch.tensor([[False, True]])
    y = block._dropout(x, response)
    assert y.mean(-1)[0].tolist() == pytest.approx([1.0, 1.0], abs=0.02)
    assert (y == 0).float().mean(-1)[0].tolist() == pytest.approx([0.5, 0.25], abs=0.02)


def test_scaling_switches():
    ids = torch.randint(0, 50, (1, 5))
    with torch.no_grad():
        plain, scaled = run(make(), ids), run(make(scale_logits=True), ids)
        torch.testing.assert_close(scaled * 32**0.5, plain)
        model = make(normalize_input_embeds=True)
        assert torch.equal(model.first_hidden(model.wte(ids)), model.wte(ids) * 32**0.5)


def test_half_precision_keeps_norms_and_rotation_exact():
    """bfloat16 against float32 with the same (bfloat16) weights: the error stays that of the matrix products."""
    for style in STYLES:
        exact = make(style)
        for parameter in exact.parameters():
            parameter.data = parameter.data.bfloat16().float()
        ids, positions = torch.randint(0, 50, (2, 16)), (torch.arange(16) + 30_000).expand(2, -1)
        with torch.no_grad():
            expected = run(exact, ids, positions)
            half = run(exact.bfloat16(), ids, positions)
        assert half.dtype == torch.bfloat16
        error = (half.float() - expected).norm() / expected.norm()
        assert error < 0.05, (style, error)


def test_new_weights():
    config = dataclasses.replace(BASE, d_model=256, n_heads=4, n_layers=8, mlp_hidden_size=512, qkv_bias=True)
    model = Transformer(config)
    model.reset_parameters()
    block = model.blocks[0]
    assert block.att_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.ff_out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.attn_out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.att_proj.bias.any()
    assert (block.attn_norm.weight == 1).all()
    assert model.ff_out.weight.std().item() == pytest.approx(0.02, rel=0.05)
