"""Sharded training of the models with more than Molmo's inputs: two ranks, one of them without an image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from molmo_core.models.base import BaseModelConfig, ModelBase
from molmo_core.models.molmo2 import Molmo2Config
from tests.molmo_core.models.golden_point import load_point_model

MODELS = ("he_molmo", "molmo2", "molmo_point")
ROWS = {
    "image": {
        "image": np.arange(70 * 110 * 3, dtype=np.uint8).reshape(70, 110, 3),
        "question": "How many?",
        "answer": "3",
        "style": "demo",
    },
    "text": {"question": "What is the capital of France?", "answer": "Paris.", "style": "demo"},
}
POINTS = {"style": "pointing", "label": "dogs", "points": [[10, 20], [90, 60]]}


def build(name: str, golden: Path) -> ModelBase:
    torch.manual_seed(0)
    if name == "he_molmo":
        overrides = ["token_scorer.low_res_features_drop=0", "token_scorer.high_res_patch_prior_drop=0", "token_selector.loss_weight=0"]
        model = BaseModelConfig.load(golden / "he-molmo" / "config.yaml", overrides).build_model()
        model.load_state_dict({k: v.float() for k, v in load_file(golden / "he-molmo" / "model.safetensors").items()})
        return model.train()
    if name == "molmo_point":
        return load_point_model(golden / "molmo-point" / "a").train()
    he = BaseModelConfig.load(golden / "he-molmo" / "config.yaml").as_dict()
    config = Molmo2Config.new(llm=he["llm"], vision_backbone=he["vision_backbone"], mm_preprocessor={"overlap_margins": (1, 1)})
    return config.build_model().train()


def batch_of(model: ModelBase, *names: str) -> dict[str, torch.Tensor]:
    preprocessor = model.config.build_preprocessor(for_inference=False, is_training=False)
    rows = ROWS if model.config.model_name != "molmo_point" else ROWS | {"image": {"image": ROWS["image"]["image"], **POINTS}}
    return model.config.build_collator(None, None, include_metadata=False)([preprocessor(rows[name]) for name in names])


def step(model: Any, batch: dict[str, torch.Tensor], divisor: float) -> None:
    model(**batch, loss_divisor=divisor).loss.backward()


def worker(rank: int, golden: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    for name in MODELS:
        model = build(name, Path(golden))
        model.apply_fsdp2()
        batch = batch_of(model, ("image", "text")[rank])
        total = batch["loss_masks"].sum().clone()
        dist.all_reduce(total)
        step(model, batch, total.item() / 2)  # gradients are averaged over the ranks
        whole = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        if rank == 0:
            torch.save(whole, f"{out}/{name}.pt")
    dist.barrier()  # a rank that leaves early can abort the other
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one(golden: Path, tmp_path: Path) -> None:
    mp.spawn(worker, (str(golden), str(tmp_path)), nprocs=2)
    for name in MODELS:
        sharded = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        model = build(name, golden)
        batch = batch_of(model, "image", "text")
        step(model, batch, batch["loss_masks"].sum().item())
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(sharded[key], parameter.grad, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", MODELS)
def test_a_step_leaves_the_batch_as_it_is(golden: Path, name: str) -> None:
    """Streamed batches are read-only views of memory that others share, and torch does not stop a write to them."""
    model = build(name, golden)
    batch = batch_of(model, "image", "text")
    before = {key: value.clone() for key, value in batch.items()}
    step(model, batch, batch["loss_masks"].sum().item())
    assert batch.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(batch[key], value), key
