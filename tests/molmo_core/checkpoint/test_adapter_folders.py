"""Adapters as a folder: onto their base they are the merged model, onto another one they are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from molmo_core.checkpoint import CheckpointError, load_checkpoint, load_model
from molmo_core.checkpoint.adapters import Adapters, base_checksums, save_adapters
from molmo_core.checkpoint.checksums import write_checksums
from molmo_core.checkpoint.export import export_and_verify
from molmo_core.checkpoint.folder import locate
from molmo_core.nn.lora import adapted_layers
from molmo_core.registry import BaseModelConfig


@pytest.fixture
def base(golden, tmp_path):
    """An own checkpoint."""
    load_model(golden / "molmo-qwen2-clip", torch.float32).save_checkpoint(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, seed=0):
    """A model with adapters as if they had been trained."""
    model = load_model(base)
    model.add_adapters(("connector", "vit", "llm"), rank=4, alpha=8.0)
    torch.manual_seed(seed)
    for layer in adapted_layers(model):
        layer.reset_adapter()
        torch.nn.init.normal_(layer.lora_b, std=0.02)
    return model


@pytest.fixture
def adapters(base, tmp_path):
    """Their folder, and the tensors of the merged model."""
    model = adapted(base)
    save_adapters(model, tmp_path / "adapters", base, base_checksums(base))
    model.merge_adapters()
    model.save_checkpoint(tmp_path / "merged")
    return tmp_path / "adapters", load_model(tmp_path / "merged").state_dict()


def same(model, tensors):
    return model.keys() == tensors.keys() and all(torch.equal(model[name], tensor) for name, tensor in tensors.items())


def test_base_and_adapters_are_the_merged_model(adapters, base, tmp_path):
    folder, merged = adapters
    assert same(load_model(folder).state_dict(), merged)
    assert not same(load_model(base).state_dict(), merged)
    assert BaseModelConfig.load(locate(folder)).as_dict() == BaseModelConfig.load(locate(base)).as_dict()
    half = load_model(folder, torch.bfloat16).state_dict()
    assert same(half, {name: tensor.bfloat16() for name, tensor in merged.items()})
    assert same(load_model(folder, torch.float64).state_dict(), added(base, folder, torch.float64))
    existing = load_model(base)
    load_checkpoint(existing, folder)
    assert same(existing.state_dict(), merged)


def added(base, folder, dtype):
    """The sum in a wider type."""
    tensors, adapters = load_model(base, dtype).state_dict(), Adapters(folder)
    return tensors | {f"{name}.weight": tensors[f"{name}.weight"] + adapters.change(name) for name in adapters.layers}


def test_adapters_of_adapters(adapters, tmp_path):
    """A run with `lora` may begin from adapters."""
    folder, _ = adapters
    second = adapted(folder, seed=1)
    save_adapters(second, tmp_path / "second", folder, base_checksums(folder))
    second.merge_adapters()
    second.save_checkpoint(tmp_path / "both")
    assert same(load_model(tmp_path / "second").state_dict(), load_model(tmp_path / "both").state_dict())
    results = export_and_verify(tmp_path / "second", tmp_path / "out", "native", torch.bfloat16)
    assert all(result.passed for result in results)
    expected = {name: tensor.bfloat16() for name, tensor in load_model(tmp_path / "both").state_dict().items()}
    assert same(load_model(tmp_path / "out").state_dict(), expected)


def test_the_files_are_those_of_peft(adapters, base):
    folder, _ = adapters
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["base_model_name_or_path"] == str(base)
    assert "transformer.blocks.0.att_proj" in config["target_modules"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(config["target_modules"])
    assert tensors["base_model.model.transformer.blocks.0.att_proj.lora_A.weight"].shape[0] == 4
    layers = list(adapted_layers(adapted(base)))
    assert sum(t.numel() for t in tensors.values()) == sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers)


def test_another_base_a_damaged_file_and_a_lost_base_are_refused(adapters, base, tmp_path):
    folder, merged = adapters
    moved = tmp_path / "moved"
    base.rename(moved)
    with pytest.raises(CheckpointError, match=r"adapters of .*/base, which is not there .*base_model_name_or_path"):
        load_model(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(moved)}))
    assert same(load_model(folder).state_dict(), merged)
    (moved / "checksums.json").unlink()  # a published checkpoint has none: the files are read
    assert same(load_model(folder).state_dict(), merged)

    model = load_model(moved)
    with torch.no_grad():
        next(model.parameters())[0] += 1
    model.save_checkpoint(moved)
    for load in (load_model, lambda path: load_checkpoint(model, path)):
        with pytest.raises(CheckpointError, match=r"trained on another model than the one in .*/moved .*model.safetensors"):
            load(folder)

    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: its content has changed"):
        load_model(folder)
    (folder / "checksums.json").unlink()
    write_checksums(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: missing"):
        load_model(folder)


def test_a_model_without_adapters_has_none_to_save(base, tmp_path):
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapters(load_model(base), tmp_path / "none", base, {})
