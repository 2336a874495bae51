"""What the plan says of memory, beside the tensors that a run really holds."""

import dataclasses

import pytest
import torch
from batches import RandomLoader, tiny_config, tiny_model
from typer.testing import CliRunner

from jobs.plan import app
from molmo_core.nn.attention import Whole
from molmo_core.nn.llm import BLOCKS, BlockInputs
from molmo_core.nn.rope import rotary_tables
from molmo_core.nn.vit import VitBlock
from molmo_core.registry import BaseModelConfig
from pipelines.training.build import build
from pipelines.training.config import GroupConfig, OptimConfig
from pipelines.training.mesh import Mesh
from pipelines.training.optim import Optimizer
from pipelines.training.parallel_config import ParallelConfig
from pipelines.training.plan import kept_by_block, kept_by_vision_block, plan, suggestions
from pipelines.training.travel import NETWORK, NVLINK, travel

TOKENS = 128


def kept(block, *arguments):
    """Numbers that a compiled block keeps for the backward pass, parameters aside."""
    block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*arguments)
    return sum(count for count, _ in storages.values()) / 2


def test_activations_of_a_block_of_the_language_model():
    llm = tiny_model(d_model=256, mlp_hidden_size=2048, n_heads=8, n_kv_heads=8).llm
    block = BLOCKS[llm.block_type](llm).to(torch.bfloat16).train()
    x = torch.randn(1, TOKENS, 256, dtype=torch.bfloat16, requires_grad=True)
    rotary = rotary_tables(llm, torch.arange(TOKENS)[None])[0]
    assert kept(block, x, rotary, BlockInputs(Whole()), 0) == pytest.approx(kept_by_block(llm) * TOKENS, rel=0.1)


def test_activations_of_a_block_of_the_vision_encoder():
    vit = dataclasses.replace(
        tiny_model().vision_backbone.vit, image_emb_dim=128, image_num_heads=8, image_num_key_value_heads=8, image_head_dim=16
    )
    block = VitBlock(vit).to(torch.bfloat16).train()
    x = torch.randn(2, TOKENS // 2, 128, dtype=torch.bfloat16, requires_grad=True)
    assert kept(block, x) == pytest.approx(kept_by_vision_block(vit) * TOKENS, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_moments_are_those_of_a_run(precision):
    groups = {group: GroupConfig() for group in ("connector", "vit", "llm")}
    config = tiny_config("-", precision=precision, ft_vit=False, optim=OptimConfig(**groups))
    made = plan(config)
    model = build(config, torch.device("cpu"), Mesh())
    optimizer = Optimizer(model, config.optim)
    model(**next(iter(RandomLoader(config.data, config.model, 4, 64, 1, 0, 1))), return_logits=False).loss.backward()
    optimizer.step(torch.zeros((), dtype=torch.bool))
    assert made.weights == sum(p.nbytes for p in model.parameters())
    assert made.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = (state for o in optimizer.optimizers for state in o.state.values())
    assert made.optimizer == sum(t.nbytes for state in states for t in state.values() if t.ndim)


@pytest.mark.parametrize(("rows", "recompute", "measured"), [(1, "none", 50.3), (2, "selective", 56.9), (2, "full", 34.9)])
def test_peaks_are_those_measured_on_a_gpu(rows, recompute, measured):
    """GiB of one H100 at Molmo2-4B's size (docs/scaling.md)."""
    groups = {group: GroupConfig() for group in ("connector", "vit", "llm")}
    config = tiny_config(
        "-", model=BaseModelConfig.load("configs/models/molmo2-4b.yaml"), precision="bf16", activation_checkpointing=recompute,
        global_batch_size=rows, sequence_length=4096, optim=OptimConfig(**groups),
    )  # fmt: skip
    assert plan(config, crops=14).peak / 2**30 == pytest.approx(measured, rel=0.15)


def test_more_workers_hold_less_each():
    config = tiny_config("-", global_batch_size=8, model=tiny_model(n_layers=8))
    one, four = plan(config), plan(dataclasses.replace(config, num_workers=4, device_batch_size=1))
    assert (four.weights, four.optimizer) == (one.weights // 4, one.optimizer // 4)
    assert four.language == one.language // 8
    recomputed = plan(dataclasses.replace(config, activation_checkpointing="full"))
    assert recomputed.language < one.language / 2
    assert recomputed.vision < one.vision
    assert recomputed.tokens_per_second < one.tokens_per_second
    assert suggestions(config, 10**9)[0][0].device_batch_size == 8
    assert not suggestions(config, 10**5)


def test_what_travels():
    """Against the sums that docs/scaling.md shows: P parameters of 4 bytes among 8 GPUs of a host, or 64 of eight hosts."""
    config = tiny_config("-", global_batch_size=64, num_workers=8)
    whole = 4 * plan(config).parameters
    eight = travel(config)
    assert eight.parameters == eight.gradients == pytest.approx(whole * 7 / 8)
    assert (eight.replicas, eight.context) == (0, 0)
    assert eight.seconds == pytest.approx(2 * whole * 7 / 8 / NVLINK)
    hybrid = travel(dataclasses.replace(config, num_workers=64, parallel=ParallelConfig(replicate=8)))
    assert hybrid.parameters == eight.parameters
    assert hybrid.replicas == pytest.approx(2 * 7 / 8 * whole / 8)
    assert hybrid.seconds == pytest.approx(eight.seconds + hybrid.replicas / NETWORK)
    assert travel(dataclasses.replace(config, num_workers=64)).seconds == pytest.approx(2 * whole * 63 / 64 / NETWORK)
    assert eight.efficiency(eight.seconds) == pytest.approx((0.5, 1.0))


def test_the_job(tmp_path):
    command = ["configs/train/demo.yaml", "--gpus", "2", "--memory", "80", "global_batch_size=24"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "on 2 GPU(s) of 80 GB" in result.output
    assert "GB travel to a GPU" in result.output
    assert "device_batch_size=" in result.output
    assert CliRunner().invoke(app, [*command[:-2], "0.0001"]).exit_code == 2
