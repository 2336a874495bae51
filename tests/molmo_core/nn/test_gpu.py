"""What runs on a GPU only: grouped matrix products, compiled FlexAttention with its backward pass, bfloat16 kernels."""

import pytest
import torch

from molmo_core.inputs import Inputs
from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.attention import attend
from molmo_core.nn.moe import ExpertMlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("tokens", [1, 3, 500])
@pytest.mark.parametrize("autocast", [False, True])
def test_grouped_products_equal_the_exact_path(tokens, autocast):
    """Rows of experts, some of them without any, in bfloat16 on the GPU and in float32 on the CPU."""
    torch.manual_seed(0)
    exact = ExpertMlp(256, 128, 16)
    for parameter in exact.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.bfloat16().float()
    grouped = ExpertMlp(256, 128, 16).cuda()
    grouped.load_state_dict(exact.state_dict())
    if not autocast:
        grouped = grouped.bfloat16()
    counts = torch.bincount(torch.randint(0, 16, (tokens,)), minlength=16)
    x, target = torch.randn(tokens, 256).bfloat16().float(), torch.randn(tokens, 256)
    results = []
    for mlp, device, dtype in ((exact, "cpu", torch.float32), (grouped, "cuda", torch.float32 if autocast else torch.bfloat16)):
        with torch.autocast(device, torch.bfloat16, enabled=autocast and device == "cuda"):
            out = mlp(x.to(device, dtype), counts.to(device))
        (out.float() * target.to(device)).sum().backward()
        results.append((out.detach().cpu(), {n: p.grad.cpu() for n, p in mlp.named_parameters()}))
    assert relative(results[1][0], results[0][0]) < 0.02
    for name, gradient in results[1][1].items():
        assert relative(gradient, results[0][1][name]) < 0.02, name


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_kernels(queries, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 128, device="cuda") for h, n in ((28, queries), (4, 64), (4, 64)))
    mask = (torch.rand(2, 1, queries, 64, device="cuda") > 0.3) if masked else None
    if mask is not None:
        mask[..., 0] = True
    exact = attend(q, k, v, mask)
    assert relative(attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask), exact) < 0.02


def make(mode: str | None, compiled: bool, block: str = "sequential") -> Molmo:
    llm = {"d_model": 256, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 512, "vocab_size": 500, "block_type": block}
    if block == "moe":
        llm |= {"moe_num_experts": 8, "moe_top_k": 2}
    config = MolmoConfig.new(llm=llm, vision_backbone=None, bi_directional_attn=mode)
    torch.manual_seed(0)
    model = Molmo(config).cuda().train()
    model.apply_activation_checkpointing()
    if compiled:
        model.apply_compile()
    return model


def packs(length: int, seed: int) -> dict[str, torch.Tensor]:
    """Two packs of three examples with an image each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 500, (2, length), generator=generator)
    segments = torch.arange(length).mul(3).div(length, rounding_mode="floor").mul(100_000).expand(2, -1).clone()
    for start in range(5, length - 60, length // 3):
        ids[:, start : start + 40] = 502
        segments[:, start - 5 : start + 40] += 10_000
    labels = torch.randint(0, 500, (2, length), generator=generator)
    return {"input_ids": ids, "labels": labels, "subsegment_ids": segments}


@pytest.mark.parametrize(("block", "compiled"), [("sequential", False), ("sequential", True), ("moe", True)])
@pytest.mark.parametrize("mode", ["image_tokens"])
def test_flex_training_equals_dense(mode, compiled, block):
    """Loss and gradients under bfloat16 autocast, against the dense mask in float32."""
    batch = packs(300, 1)
    gradients = []
    for implementation in ("sdpa", "flex"):
        model = make(mode, compiled and implementation == "flex", block)
        model.attention_implementation = implementation
        with torch.autocast("cuda", torch.bfloat16, enabled=implementation == "flex"):
            loss = model(**batch, return_logits=False).loss
        loss.backward()
        gradients.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}))
    assert gradients[1][0] == pytest.approx(gradients[0][0], rel=0.01)
    for name, gradient in gradients[1][1].items():
        if "router" not in name and gradients[0][1][name].any():  # a token between two experts may change sides
            assert relative(gradient, gradients[0][1][name]) < (0.3 if block == "moe" else 0.06), name


def test_new_packs_do_not_recompile():
    from torch._dynamo.utils import counters

    model = make("image_tokens", True)
    counters.clear()
    for seed in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            model(**packs(384, seed), return_logits=False).loss.backward()
        if seed == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs


def test_half_precision_model_on_the_gpu():
    """A model cast whole: decoding with a cache gives the logits of one pass."""
    model = make(None, False).eval().bfloat16()
    ids = packs(40, 3)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :32], use_cache=True)
        steps = [out.logits]
        for token in ids[:, 32:].split(1, dim=1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert relative(torch.cat(steps, dim=1), whole) < 0.03


@pytest.mark.parametrize("block", ["sequential", "moe"])
def test_a_decoding_step_can_be_captured(block):
    """embed, run and head of one token a row as a CUDA graph: nothing on the way waits for the device."""
    model = make("image_tokens", False, block).eval().bfloat16()
    keys, values = torch.randn(2, 4, 2, 32, 64, device="cuda", dtype=torch.bfloat16).unbind()  # 4 rows, 32 tokens before

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, torch.cat((keys, k), 2), torch.cat((values, v), 2))

    def step(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedded = model.embed(Inputs(ids, positions))
        return model.head(embedded, model.run(embedded.tokens, attention)).logits

    ids, positions = torch.randint(0, 500, (4, 1), device="cuda"), torch.full((4, 1), 32, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step(ids, positions)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(ids, positions)
        for seed in range(3):
            ids.copy_(torch.randint(0, 500, (4, 1), generator=torch.Generator().manual_seed(seed)))
            positions.add_(1)
            graph.replay()
            torch.testing.assert_close(captured, step(ids, positions), atol=0.05, rtol=0.05)
