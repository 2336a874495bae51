"""What of the engine runs on a GPU only: the kernels, and decoding by graphs ahead of the host."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from molmo_core.generation.engine.decoding import GraphDecoder, PlainDecoder
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.prompt_lookup import PromptLookup
from molmo_core.generation.engine.requests import Request, SamplingParams, Token
from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.linear import Linear
from tests.molmo_core.generation.engine.prompts import family_model, family_prompts
from tests.molmo_core.generation.engine.test_speculation import told

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


def marks(length: int, *groups: tuple[int, int], questions: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Flags of a sequence (see `Prompt.flags`): groups of tokens that see each other, and tokens that all of these look ahead to."""
    flags = np.full(length, -2, np.int32)
    for number, (start, end) in enumerate(groups):
        flags[start:end] = 2 * number
    flags[slice(*questions)] |= 1
    return flags


PROMPTS = {
    "causal": [(0, marks(40))],
    "an image": [(0, marks(200, (5, 190))), (0, marks(33)), (64, marks(100))],
    "two images": [(0, marks(300, (10, 60), (80, 250))), (150, marks(170))],
    "a question ahead": [(0, marks(300, (10, 250), questions=(252, 299)))],
    "behind a prefix": [(128, marks(400, (200, 390))), (1, marks(2))],
}
"""First place that is computed, and the flags of the whole sequence."""


@pytest.mark.parametrize(("heads", "kv_heads", "width", "page"), [(32, 8, 128, 64), (28, 4, 128, 64), (16, 16, 64, 16), (4, 2, 16, 16)])
@pytest.mark.parametrize("name", PROMPTS)
def test_attention_of_prompts(name, heads, kv_heads, width, page):
    from molmo_core.generation.engine.prompt_kernel import ROWS, PromptTables, prompt_attention, write_pages

    torch.manual_seed(0)
    prompts, nan = PROMPTS[name], float("nan")
    most = max(-(-len(flags) // page) for _, flags in prompts)
    tables = (torch.randperm(len(prompts) * most) + 1).view(len(prompts), most)
    shape = (len(prompts) * most + 1, kv_heads, page, width)
    # What is in a page but not of an earlier step must not be seen, whatever it is.
    keys, values = (torch.full(shape, nan, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rows = sum(len(flags) - start for start, flags in prompts)
    q = torch.randn(rows + 1, heads, width, dtype=torch.bfloat16, device="cuda").transpose(0, 1)[None]
    own = [torch.full((1, kv_heads, rows + 1, width), nan, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    pages, offsets = torch.zeros(2, 1, rows + 1, dtype=torch.int64)
    blocks, exact, row = [], [], 0
    for i, (start, flags) in enumerate(prompts):
        end, group = len(flags), flags >> 1
        query, key = np.arange(start, end)[:, None], np.arange(end)[None]
        meet = (group[start:, None] == group[None]) | (flags & 1 == 1)[None]
        seen = (key <= query) | ((group[start:, None] >= 0) & meet)
        for place in range(start, end, ROWS):
            stop = min(place + ROWS, end)
            limit = int(np.flatnonzero(seen[: stop - start].any(0)).max()) + 1
            blocks.append((i, row + place - start, stop - place, place, limit, start))
        k, v = torch.randn(2, kv_heads, end, width, dtype=torch.bfloat16, device="cuda")
        to = slice(row, row + end - start)
        places = torch.arange(end)
        for store, mine, all_of_it in ((keys, own[0], k), (values, own[1], v)):
            store[tables[i, places[:start] // page], :, places[:start] % page] = all_of_it[:, :start].transpose(0, 1)
            mine[0, :, to] = all_of_it[:, start:]
        pages[0, to], offsets[0, to] = tables[i, places[start:] // page], places[start:] % page
        k, v = (t.float().repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        exact.append(F.scaled_dot_product_attention(q[0, :, to].float(), k, v, torch.from_numpy(seen).cuda()))
        row += end - start
    flags = torch.from_numpy(np.concatenate([flags[start:] for start, flags in prompts])).cuda()
    arguments = PromptTables(torch.tensor(blocks, dtype=torch.int32).cuda(), tables.int().cuda(), flags)
    out = prompt_attention(q, *own, keys, values, arguments, bool((flags >= 0).any()))
    assert relative(out[0, :, :rows], torch.cat(exact, 1)) < 0.02
    assert not out[0, :, rows].any(), "rows of nobody get 0"
    write_pages(*own, keys, values, pages.cuda(), offsets.cuda())
    for store, mine in ((keys, own[0]), (values, own[1])):
        assert torch.equal(store[pages[0, :rows], :, offsets[0, :rows]].transpose(0, 1), mine[0, :, :rows])


@pytest.mark.parametrize("kind", ["plenty", "chunks"])
@pytest.mark.parametrize("name", ["molmo2", "molmo2 within_image", "molmo2 image_to_question", "molmo2 causal"])
def test_first_tokens_are_those_of_a_forward(name, kind, golden):
    """Prompts by the kernel, packed and in chunks, vision encoder in one pass: the log-probabilities of a plain forward."""
    model = family_model(name, golden).cuda().bfloat16()
    examples = family_prompts(name, model, golden, videos=False)
    engine = Engine(model, EngineLimits(cache_bytes=64 << 20, page_size=16, prefill_tokens=10_000 if kind == "plenty" else 24))
    assert engine.runner.cache.has_kernels
    asked = [Request(example, SamplingParams(max_tokens=1, logprobs=20, ignore_eos=True)) for example in examples]
    for request in asked:
        engine.add(request)
    first = {}
    while engine.active:
        for request, event in engine.step():
            if isinstance(event, Token):
                first[request] = event.logprobs
    for request, example in zip(asked, examples):
        inputs = {k: torch.tensor(v)[None].cuda() for k, v in example.items()}
        with torch.no_grad():
            exact = model(**inputs).logits[0, -1].float().log_softmax(-1)
        ids = [token for token, _ in first[request].top]
        assert relative(torch.tensor([value for _, value in first[request].top]), exact[ids].cpu()) < 0.02


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


@pytest.fixture(scope="module", params=["sequential", "moe", "norms of heads", "norms after"])
def model(request):
    llm = {"d_model": 256, "n_heads": 8, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 512, "vocab_size": 500}
    if request.param == "moe":
        llm |= {"block_type": "moe", "moe_num_experts": 8, "moe_top_k": 2}
    elif request.param == "norms of heads":
        llm |= {"attention_layer_norm": True, "attention_layer_norm_type": "qwen3"}
    elif request.param == "norms after":  # compiled blocks, the others are done by kernels
        llm |= {"norm_after": True}
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
        graphs = engine.decoder.step(sequences).logits.clone()
        plain = PlainDecoder(model, engine.runner.cache).step(sequences).logits
    assert relative(graphs, plain) < 0.03


def test_proposed_tokens_see_those_before_them(model):
    """In one step: the logits that plain decoding gives, and those of one token after the other."""
    engine = Engine(model, EngineLimits(max_running=16, cache_bytes=64 << 20, speculate=3))
    for request in requests(4):
        engine.add(request)
    with torch.inference_mode():
        engine.step()
        sequences = engine.scheduler.plan().decode
        count = len(sequences)
        room = [min(3, len(sequence.pages) * 64 - sequence.computed - 1) for sequence in sequences]
        proposed = [list(range(20 * i, 20 * i + n)) for i, n in enumerate(room)]
        assert sum(room) > 3
        graphs = engine.decoder.step(sequences, proposed).logits.clone()
        plain = PlainDecoder(model, engine.runner.cache).step(sequences, proposed).logits.clone()
        assert relative(graphs, plain) < 0.03
        row = count
        for i, sequence in enumerate(sequences):
            for token in proposed[i]:
                sequence.tokens.append(token)
                sequence.computed += 1
                alone = PlainDecoder(model, engine.runner.cache).step([sequence]).logits[0]
                if model.config.llm.block_type != "moe":  # a token between two experts may change sides
                    assert relative(graphs[row], alone) < 0.05
                row += 1


def test_speculation_changes_nothing(model, monkeypatch):
    """The right tokens are proposed, with mistakes."""
    answers = []
    for speculate in (0, 3):
        engine = Engine(model, EngineLimits(max_running=12, cache_bytes=64 << 20, speculate=speculate))
        asked = requests(9)
        for request in asked:
            engine.add(request)
        if speculate:
            prompts = [tuple(request.example["input_ids"].tolist()) for request in asked]
            monkeypatch.setattr(PromptLookup, "propose", told(dict(zip(prompts, answers[0])), 0.2))
        tokens = {request: [] for request in asked}
        while engine.active:
            for request, event in engine.step():
                if isinstance(event, Token):
                    tokens[request].append(event.id)
        assert [len(tokens[request]) for request in asked] == [request.params.max_tokens for request in asked]
        answers.append([tokens[request] for request in asked])
    assert engine.speculation.accepted > 5
    same = sum(a == b for a, b in zip(*answers))
    assert same >= 7, "batches of other sizes round differently; most answers are the same nevertheless"


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
