"""Schedules, what is trained, Muon, clipping."""

import math

import pytest
import torch
from batches import tiny_config, tiny_model

from molmo_core.config import ConfigError
from pipelines.training.config import GroupConfig, OptimConfig, ScheduleConfig
from pipelines.training.muon import Muon, assign, orthogonalise, rows_of
from pipelines.training.optim import Optimizer, freeze, is_matrix, learning_rate, stacked_rows

GROUP = GroupConfig(lr=2.0, warmup=10)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (ScheduleConfig("cosine"), 1, 0.2),
        (ScheduleConfig("cosine"), 10, 2.0),
        (ScheduleConfig("cosine"), 55, 0.2 + 1.8 * (1 + math.cos(math.pi * 0.5)) / 2),
        (ScheduleConfig("cosine"), 100, 0.2),
        (ScheduleConfig("linear", alpha_f=0.0), 55, 1.0),
        (ScheduleConfig("linear", alpha_f=0.0), 100, 0.0),
        (ScheduleConfig("linear", alpha_f=0.0, hold=0.4), 40, 2.0),
        (ScheduleConfig("linear", alpha_f=0.0, hold=0.4), 70, 1.0),
        (ScheduleConfig("constant"), 100, 2.0),
        (ScheduleConfig("inverse_sqrt"), 40, 1.0),
    ],
)
def test_learning_rate(schedule, step, expected):
    assert learning_rate(GROUP.lr, step, 100, GROUP, schedule) == pytest.approx(expected)


def test_schedule_without_warmup_begins_at_the_peak():
    assert learning_rate(2.0, 1, 100, GroupConfig(lr=2.0, warmup=0), ScheduleConfig("inverse_sqrt")) == 2.0
    assert learning_rate(2.0, 1, 100, GroupConfig(lr=2.0, warmup=0), ScheduleConfig("linear")) == pytest.approx(2.0, rel=0.01)


ENDS = {"transformer.wte.embedding", "transformer.ln_f.weight", "transformer.ff_out.weight"}


@pytest.mark.parametrize(
    ("value", "trained"),
    [
        ("lm_head", {"transformer.ln_f.weight", "transformer.ff_out.weight"}),
        ("ln_f", {"transformer.ln_f.weight"}),
        ("wte", {"transformer.wte.embedding"}),
        ("all", ENDS),
    ],
)
def test_ft_embedding(tmp_path, value, trained):
    model = tiny_model().build_model()
    freeze(model, tiny_config(tmp_path, ft_embedding=value))
    chosen = {name for name, p in model.named_parameters() if p.requires_grad}
    assert chosen & ENDS == trained
    assert {"transformer.blocks.0.attn_norm.weight", "transformer.wte.new_embedding"} <= chosen


def test_frozen_parts_have_no_optimiser(tmp_path):
    config = tiny_config(tmp_path, ft_vit=False, ft_llm=False)
    model = tiny_model().build_model()
    freeze(model, config)
    optimizer = Optimizer(model, config.optim)
    assert set(optimizer.parameters) == {"connector"}
    assert {id(p) for o in optimizer.optimizers for g in o.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    text_only = tiny_model()
    text_only.vision_backbone = None
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze(text_only.build_model(), tiny_config(tmp_path, ft_connector=False, ft_llm=False))


def test_tied_embedding_follows_the_embedding(tmp_path):
    model = tiny_model(weight_tying=True).build_model()
    freeze(model, tiny_config(tmp_path, ft_embedding="lm_head"))
    assert not model.transformer.wte.embedding.requires_grad


def test_every_trainable_parameter_is_updated_once_and_matrices_by_muon(tmp_path):
    config = tiny_config(tmp_path)
    model = tiny_model().build_model()
    optimizer = Optimizer(model, config.optim)
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for o in optimizer.optimizers if isinstance(o, Muon) for g in o.param_groups for p in g["params"]}
    everything = [names[id(p)] for o in optimizer.optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(names.values())
    assert {"vision_backbone.image_vit.patch_embedding.weight", "transformer.blocks.0.ff_out.weight"} <= muon
    assert not muon & {
        "transformer.ff_out.weight", "transformer.wte.embedding", "transformer.wte.new_embedding", "vision_backbone.pad_embed",
        "vision_backbone.image_vit.positional_embedding",
    }  # fmt: skip
    assert is_matrix("transformer.blocks.0.att_proj.weight", torch.zeros(2, 2))
    rates = optimizer.set_learning_rates(1, 6)
    assert rates["lr/llm"] == pytest.approx(1.5e-3)
    assert rates["lr/llm_muon"] == pytest.approx(0.01)


def test_clipping_is_per_part(tmp_path):
    model = tiny_model().build_model()
    optimizer = Optimizer(model, OptimConfig(max_grad_norm=1.0))
    for parameters, size in zip(optimizer.parameters.values(), (10.0, 0.1, 3.0)):
        for p in parameters:
            p.grad = torch.full_like(p, size / math.sqrt(sum(q.numel() for q in parameters)))
    norms = {group: value.sqrt() for group, value in optimizer.squared_norms().items()}
    assert [norm.item() for norm in norms.values()] == pytest.approx([10.0, 0.1, 3.0], rel=1e-4)
    optimizer.clip(norms)
    assert [value.sqrt().item() for value in optimizer.squared_norms().values()] == pytest.approx([1.0, 0.1, 1.0], rel=1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24), (3, 16, 40)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    values = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((u @ vt).flatten(), result.flatten(), dim=0) > 0.97


def test_matrices_of_a_fused_parameter_are_orthogonalised_apart():
    torch.manual_seed(0)
    fused, first, second = (
        torch.nn.Parameter(torch.zeros(48, 16)),
        torch.nn.Parameter(torch.zeros(16, 16)),
        torch.nn.Parameter(torch.zeros(32, 16)),
    )
    gradient = torch.randn(48, 16)
    fused.grad, first.grad, second.grad = gradient.clone(), gradient[:16].clone(), gradient[16:].clone()
    Muon([fused], fused={id(fused): [16, 32]}).step()
    Muon([first, second]).step()
    torch.testing.assert_close(fused.detach(), torch.cat([first, second]).detach())
    llm = tiny_model().llm
    for name, parameter in tiny_model().build_model().named_parameters():
        assert sum(stacked_rows(name, llm) or [len(parameter)]) == len(parameter), name


def test_muon_equals_torch():
    """torch's Muon iterates in bfloat16, so the updates agree only roughly; the momentum and the scale must."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(48, 16)) for _ in range(2))
    pair = (
        Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="original"),
    )
    for _ in range(3):
        gradient = torch.randn(48, 16)
        for parameter, optimizer in zip((ours, theirs), pair):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=3e-3, rtol=0)
    torch.testing.assert_close(pair[0].state[ours]["momentum_buffer"], pair[1].state[theirs]["momentum_buffer"])


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_owners_share_the_work():
    shapes = [(96, 96)] * 8 + [(512, 96)] * 4 + [(3, 5)]
    owners = assign(shapes, 3)
    load = [sum(r * c * min(r, c) for (r, c), o in zip(shapes, owners) if o == rank) for rank in range(3)]
    assert max(load) - min(load) <= 512 * 96 * 96
    assert [rows_of(5, rank, 4) for rank in range(4)] == [2, 2, 1, 0]
