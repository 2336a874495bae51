"""Blocks in float8 on a GPU: prompts, decoding with and without graphs, as with the same weights in bfloat16."""

import pytest
import torch

from molmo_core.generation.engine.decoding import GraphDecoder, PlainDecoder
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.quantization import quantise_blocks
from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.float8 import Float8Linear
from tests.molmo_core.generation.engine.test_engine_gpu import relative, requests
from tests.molmo_core.generation.engine.test_quantization import rounded_twin

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that converts float8"
)


@pytest.fixture(params=["sequential", "bias", "norms of heads", "norms after", "float16"])
def model(request):
    llm = {"d_model": 256, "n_heads": 8, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 512, "vocab_size": 500}
    llm |= {
        "bias": {"qkv_bias": True},
        "norms of heads": {"attention_layer_norm": True, "attention_layer_norm_type": "qwen3"},
        "norms after": {"norm_after": True},  # compiled blocks, the others are done by kernels
    }.get(request.param, {})
    torch.manual_seed(0)
    model = Molmo(MolmoConfig.new(llm=llm, vision_backbone=None)).cuda()
    model = model.half() if request.param == "float16" else model.bfloat16()
    with torch.no_grad():
        for parameter in model.transformer.blocks.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


@pytest.mark.parametrize("count", [1, 11])
def test_logits_are_those_of_the_rounded_weights(model, count):
    """Three steps: prompts are read by their copies, then one row or several by the kernels, in a graph and plainly."""
    twin = rounded_twin(model)
    assert all(isinstance(block.ff_out, Float8Linear) for block in model.transformer.blocks)
    for block in twin.transformer.blocks:
        for layer in (block.att_proj, block.attn_out, block.ff_proj, block.ff_out):
            layer.to(next(model.parameters()).dtype)
    engines = [Engine(one, EngineLimits(max_running=16, cache_bytes=64 << 20, overlap=False)) for one in (model, twin)]
    assert all(isinstance(engine.decoder, GraphDecoder) for engine in engines)
    logits = []
    for engine in engines:
        for request in requests(count):
            engine.add(request)
        with torch.inference_mode():
            engine.step()
            sequences = engine.scheduler.plan().decode
            assert len(sequences) == count
            for sequence in sequences:  # the same token for both
                sequence.tokens[-1] = 7
            engine.decoder.keep(sequences, torch.full((count,), 7, device="cuda"))
            graphs = engine.decoder.step(sequences).logits.clone()
            plain = PlainDecoder(engine.model, engine.runner.cache).step(sequences).logits
        assert relative(graphs, plain) < 0.03
        logits.append(graphs)
    assert relative(*logits) < 0.03


def test_memory_is_given_back():
    torch.cuda.empty_cache()
    llm = {"d_model": 2048, "n_heads": 16, "n_kv_heads": 4, "n_layers": 8, "mlp_hidden_size": 16384, "vocab_size": 500}
    model = Molmo(MolmoConfig.new(llm=llm, vision_backbone=None)).cuda().bfloat16().eval()
    torch.cuda.empty_cache()
    before, matrices = torch.cuda.mem_get_info()[0], sum(p.nbytes for p in model.transformer.blocks.parameters())
    quantise_blocks(model)
    assert torch.cuda.mem_get_info()[0] - before > 0.4 * matrices
