"""Blocks in float8: which layers, for which models, and answers that are those of the rounded weights."""

import copy

import pytest
import torch
from torch import nn

from molmo_core.generation.engine.engine import Engine
from molmo_core.generation.engine.quantization import quantise_blocks
from molmo_core.generation.engine.requests import Request, SamplingParams
from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.float8 import Float8Linear
from molmo_core.nn.lora import adapted_layers, add_adapters
from tests.molmo_core.generation.engine.prompts import FAMILY, family_model, family_prompts
from tests.molmo_core.generation.engine.test_engine import alone, limits, run, tokens_of

NAMES = [name for name in FAMILY if name != "hub-molmoe"]
LLM = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 128, "vocab_size": 300}


def text_model(**llm) -> Molmo:
    torch.manual_seed(0)
    return Molmo(MolmoConfig.new(llm=LLM | llm, vision_backbone=None)).eval()


def rounded_twin(model) -> nn.Module:
    """The same model with linear layers of the kind it had, whose weights are the rounded ones."""
    twin = copy.deepcopy(model)
    quantise_blocks(model)
    for name, module in model.transformer.blocks.named_modules():
        if isinstance(module, Float8Linear):
            twin.transformer.blocks.get_submodule(name).weight.data = module.weight.float() * module.scales[:, None]
    return twin


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_rounded_weights(name, golden):
    model = family_model(name, golden)
    twin = rounded_twin(model)
    assert not any(isinstance(module, nn.Linear) for module in model.transformer.blocks.modules())
    examples = family_prompts(name, model, golden)
    requests = [Request(example, SamplingParams(max_tokens=8)) for example in examples]
    events = run(Engine(model, limits(page_size=16)), [(number, request) for number, request in enumerate(requests)])
    for request, example in zip(requests, examples):
        assert tokens_of(events[request]) == alone(twin, example, 8)


@pytest.mark.parametrize("block", ["sequential", "llama"])
def test_only_the_blocks_and_half_their_bytes(block):
    model = text_model(block_type=block).bfloat16()
    rest = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".blocks." not in name}
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    before = sum(p.nbytes for p in matrices)
    quantise_blocks(model)
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    assert len(layers) == len(matrices)
    assert sum(layer.weight.nbytes for layer in layers) == before // 2
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in rest.items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "the engine's pages have the parameters' dtype"


def test_what_cannot_be_rounded_is_refused_and_left_as_it_is():
    experts = text_model(block_type="moe", moe_num_experts=4, moe_top_k=2)
    with pytest.raises(ValueError, match="mixtures of experts"):
        quantise_blocks(experts)
    adapted = text_model()
    add_adapters(adapted, ("transformer.blocks",), 2, 4.0)
    with pytest.raises(ValueError, match="adapters must be merged"):
        quantise_blocks(adapted)
    assert not any(isinstance(module, Float8Linear) for model in (experts, adapted) for module in model.modules())
    for layer in adapted_layers(adapted):
        layer.reset_adapter()
        layer.merge()
    quantise_blocks(adapted)
    broken = text_model()
    broken.transformer.blocks[1].ff_out.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        quantise_blocks(broken)


@pytest.mark.parametrize(
    ("capability", "dtype", "told"),
    [
        ((8, 0), torch.bfloat16, r"capability 8\.9 \(Ada, Hopper\) or newer; this one has 8\.0"),
        ((9, 0), torch.float32, "dtype must be bfloat16 or float16, not float32"),
    ],
)
def test_devices_that_cannot(capability, dtype, told, monkeypatch):
    model = text_model().to(dtype)
    monkeypatch.setattr(Molmo, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=told):
        quantise_blocks(model)
