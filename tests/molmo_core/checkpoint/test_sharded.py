"""Checkpoints and generation of a model that is sharded over two processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from molmo_core.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint
from molmo_core.checkpoint.adapters import base_checksums, save_adapters
from molmo_core.checkpoint.export import export_checkpoint
from molmo_core.models.base import BaseModelConfig, ModelBase
from molmo_core.models.molmo2 import Molmo2Config
from molmo_core.nn.lora import adapted_layers
from tests.molmo_core.checkpoint.tiny_molmo2 import our_config

PROMPTS = ([[5, 9, 30]], [[7, 3, 12, 40]])


def build(golden: Path, seed: int) -> ModelBase:
    torch.manual_seed(seed)
    return BaseModelConfig.load(golden / "molmo-qwen2-clip/config.yaml").build_model().eval()


def build_molmo2(golden: Path, seed: int) -> ModelBase:
    torch.manual_seed(seed)
    return Molmo2Config.from_dict(our_config(str(golden / "tokenizer"), "olmo", True)).build_model().eval()


def with_adapters(model: ModelBase) -> ModelBase:
    """With adapters of constants, before it is sharded."""
    model.add_adapters(("llm", "vit"), rank=2, alpha=4.0)
    for layer in adapted_layers(model):
        torch.nn.init.constant_(layer.lora_a, 0.02)
        torch.nn.init.constant_(layer.lora_b, 0.1)
    return model


def two_processes(rank: int, golden: Path, folder: Path, end: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = build(golden, seed=rank + 1)  # other weights than the checkpoint's, on each rank
    model.apply_fsdp2()
    load_checkpoint(model, folder / "single")
    assert isinstance(model.transformer.ff_out.weight, DTensor)
    save_checkpoint(model, folder / "gathered", sharded=True, dtype=torch.float64)
    # The rows of the two ranks end at different steps; the ranks go on together until both are done.
    out = model.generate(torch.tensor(PROMPTS[rank]), max_new_tokens=8, eos_token_id=end)
    torch.save(out.token_ids, folder / f"tokens{rank}.pt")
    onto = build(golden, seed=rank + 1)
    onto.apply_fsdp2()
    load_checkpoint(onto, folder / "adapters")
    save_checkpoint(onto, folder / "merged")
    adapted = with_adapters(build(golden, seed=rank + 1))
    adapted.apply_fsdp2()
    save_adapters(adapted, folder / "adapters-gathered", folder / "single", base_checksums(folder / "single"))
    published = build_molmo2(golden, seed=rank + 1)
    published.apply_fsdp2()
    load_checkpoint(published, folder / "published")
    save_checkpoint(published, folder / "published-gathered")
    with pytest.raises(CheckpointError, match="missing"):  # on every rank, so that none waits
        load_checkpoint(published, folder / "single/model.safetensors")
    dist.barrier()  # a rank that leaves early can abort the other
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_models_load_generate_and_save(golden, tmp_path):
    single, molmo2 = build(golden, seed=0), build_molmo2(golden, seed=0)
    save_checkpoint(single, tmp_path / "single")
    export_checkpoint(molmo2, tmp_path / "published")
    adapted = with_adapters(build(golden, seed=0))
    save_adapters(adapted, tmp_path / "adapters", tmp_path / "single", base_checksums(tmp_path / "single"))
    free = [single.generate(torch.tensor(p), max_new_tokens=8, eos_token_id=405).token_ids[0].tolist() for p in PROMPTS]
    end = next(token for token in free[0] if token not in free[1])
    expected = [single.generate(torch.tensor(p), max_new_tokens=8, eos_token_id=end).token_ids[0].tolist() for p in PROMPTS]
    assert len(expected[0]) < len(expected[1])
    mp.spawn(two_processes, args=(golden, tmp_path, end), nprocs=2)
    merged = load_model(tmp_path / "adapters")
    assert not torch.equal(merged.transformer.blocks[0].att_proj.weight, single.transformer.blocks[0].att_proj.weight)
    for name, model in (("gathered", single), ("merged", merged), ("adapters-gathered", merged), ("published-gathered", molmo2)):
        loaded = load_model(tmp_path / name, dtype=torch.float32).state_dict()
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())
    assert not list(tmp_path.glob(".*")), "no temporary folders are left"
    for rank in range(2):
        tokens = torch.load(tmp_path / f"tokens{rank}.pt", weights_only=True)[0].tolist()
        assert [t for t in tokens if t != -1] == expected[rank]
        assert len(tokens) == 8
