"""What of the engine runs on a GPU only: the kernels, and decoding by graphs ahead of the host."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from molmo_core.generation.engine.decoding import GraphDecoder, PlainDecoder
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.requests import Request, SamplingParams, Token
from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.linear import Linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 8, 128), (28, 4, 128), (16, 16, 64), (4, 2, 16)])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("parts", [1, 4, 16])
def test_attention_over_pages(heads, kv_heads, width, page, parts):
    from molmo_core.generation.engine.decode_kernel import paged_attention

    torch.manual_seed(0)
    lengths = torch.tensor([1, page, page + 1, 333], dtype=torch.int32, device="cuda")
    most = -(-333 // page)
    tables = (torch.randperm(4 * most, device="cuda").view(4, most) + 1).int()
    keys, values = (torch.randn(4 * most + 1, kv_heads, page, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for i, length in enumerate(lengths.tolist()):  # what is behind the last token must not be seen, whatever it is
        last = tables[i, (length - 1) // page]
        keys[last, :, (length - 1) % page + 1 :] = values[last, :, (length - 1) % page + 1 :] = float("nan")
    q = torch.randn(4, heads, width, device="cuda", dtype=torch.bfloat16)
    out = paged_attention(q, keys, values, tables, lengths, parts)
    for i, length in enumerate(lengths.tolist()):
        k, v = (store[tables[i].long()].transpose(0, 1).flatten(1, 2)[:, :length].float() for store in (keys, values))
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        exact = F.scaled_dot_product_attention(q[i, :, None].float(), k, v)[:, 0]
        assert relative(out[i], exact) < 0.02


@pytest.mark.parametrize(("rows", "columns"), [(2560, 4096), (2560, 9728), (6144, 2560), (19456, 2560), (512, 512), (100, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_of_one_row(rows, columns, bias):
    torch.manual_seed(0)
    linear = Linear(columns, rows, bias=bias, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 1, columns, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        out = linear(x)
    exact = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    assert out.shape == exact.shape
    assert relative(out, exact) < 0.01


@pytest.fixture(scope="module", params=["sequential", "moe"])
def model(request):
    llm = {"d_model": 256, "n_heads": 8, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 512, "vocab_size": 500}
    if request.param == "moe":
        llm |= {"block_type": "moe", "moe_num_experts": 8, "moe_top_k": 2}
    torch.manual_seed(0)
    model = Molmo(MolmoConfig.new(llm=llm, vision_backbone=None)).cuda().bfloat16().eval()
    with torch.no_grad():
        for parameter in model.transformer.blocks.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def requests(count: int) -> list[Request]:
    rng = np.random.RandomState(0)
    params = [SamplingParams(max_tokens=int(rng.randint(5, 40)), ignore_eos=True) for _ in range(count)]
    return [Request({"input_ids": rng.randint(0, 500, rng.randint(3, 200))}, p) for p in params]


def test_graphs_give_the_logits_of_plain_decoding(model):
    engine = Engine(model, EngineLimits(max_running=16, cache_bytes=64 << 20, overlap=False))
    assert isinstance(engine.decoder, GraphDecoder)
    for request in requests(11):
        engine.add(request)
    with torch.inference_mode():
        for _ in range(3):
            engine.step()
        sequences = engine.scheduler.plan().decode
        graphs = engine.decoder.step(sequences).clone()
        plain = PlainDecoder(model, engine.runner.cache).step(sequences)
    assert relative(graphs, plain) < 0.03


def test_running_ahead_changes_nothing(model):
    """The same batches with and without: the same kernels, so the same tokens."""
    answers = []
    for overlap in (False, True):
        engine = Engine(model, EngineLimits(max_running=4, cache_bytes=64 << 20, overlap=overlap))
        asked = requests(9)
        for request in asked:
            engine.add(request)
        tokens = {request: [] for request in asked}
        while engine.active:
            for request, event in engine.step():
                if isinstance(event, Token):
                    tokens[request].append(event.id)
        assert [len(tokens[request]) for request in asked] == [request.params.max_tokens for request in asked]
        answers.append([tokens[request] for request in asked])
    same = sum(a == b for a, b in zip(*answers))
    assert same >= 7, "batches of other sizes round differently; most answers are the same nevertheless"
