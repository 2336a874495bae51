"""Own checkpoints: complete folders, strict loading."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import molmo_core
from molmo_core.checkpoint import CheckpointError, load_checkpoint, load_model, native, save_checkpoint
from molmo_core.models.base import BaseModelConfig, ModelBase
from molmo_core.models.molmo import Molmo


def build(golden: Path, name: str = "molmo-qwen2-clip", **llm) -> ModelBase:
    config = BaseModelConfig.load(golden / name / "config.yaml", [f"llm.{k}={v}" for k, v in llm.items()])
    torch.manual_seed(0)
    return config.build_model().eval()


def same_weights(one: ModelBase, other: ModelBase) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", ["molmo-qwen2-clip", "molmo-olmo-clip", "video-olmo/mixed-res", "he-molmo"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_is_complete_in_itself(golden, tmp_path, monkeypatch, name, sharded):
    monkeypatch.setattr(native, "SHARD_BYTES", 100_000)
    model = build(golden, name)
    model.save_checkpoint(tmp_path / "here", sharded=sharded)
    shutil.move(tmp_path / "here", tmp_path / "moved")
    assert len(list((tmp_path / "moved").glob("*.safetensors"))) > 1 if sharded else (tmp_path / "moved/model.safetensors").is_file()
    loaded = load_model(tmp_path / "moved")
    assert type(loaded) is type(model)
    assert same_weights(loaded, model)
    assert not loaded.training
    assert loaded.config.llm.tokenizer.identifier == str(tmp_path / "moved/tokenizer")
    text = "two dogs, 3 cups"
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)
    ours, theirs = model.config.as_dict(), loaded.config.as_dict()
    theirs["llm"]["tokenizer"] = ours["llm"]["tokenizer"]
    assert ours == theirs


def test_every_way_to_load(golden, tmp_path):
    model = build(golden)
    save_checkpoint(model, tmp_path / "checkpoint")
    other = build(golden)
    torch.nn.init.zeros_(other.transformer.ff_out.weight)
    other.load_checkpoint(tmp_path / "checkpoint")
    assert same_weights(other, model)
    assert same_weights(Molmo.from_pretrained(str(tmp_path / "checkpoint"), trust_remote_code=True), model)
    half = molmo_core.from_pretrained(tmp_path / "checkpoint", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.transformer.ff_out.weight, model.transformer.ff_out.weight.bfloat16())
    with pytest.raises(ValueError, match="dtype='float23'"):
        molmo_core.from_pretrained(tmp_path / "checkpoint", dtype="float23")


def test_stored_type_can_be_chosen(golden, tmp_path):
    model = build(golden)
    save_checkpoint(model, tmp_path / "checkpoint", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "checkpoint/model.safetensors").values()} == {torch.bfloat16}
    into = build(golden)
    load_checkpoint(into, tmp_path / "checkpoint")
    assert {p.dtype for p in into.parameters()} == {torch.float32}, "an existing model keeps its type"


def test_tied_weights_are_stored_once(golden, tmp_path):
    model = build(golden, weight_tying="true")
    save_checkpoint(model, tmp_path / "checkpoint")
    assert "transformer.ff_out.weight" not in load_file(tmp_path / "checkpoint/model.safetensors")
    assert same_weights(load_model(tmp_path / "checkpoint"), model)


def test_a_checkpoint_replaces_an_older_one_but_nothing_else(golden, tmp_path):
    model = build(golden)
    save_checkpoint(model, tmp_path / "checkpoint", sharded=True)
    torch.nn.init.ones_(model.transformer.ff_out.weight)
    save_checkpoint(model, tmp_path / "checkpoint")
    assert same_weights(load_model(tmp_path / "checkpoint"), model)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"], "no temporary folders are left"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        save_checkpoint(model, tmp_path / "photos")


def test_an_interrupted_save_leaves_the_old_checkpoint(golden, tmp_path, monkeypatch):
    model = build(golden)
    save_checkpoint(model, tmp_path / "checkpoint")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(model.tokenizer, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(model, tmp_path / "checkpoint")
    assert same_weights(load_model(tmp_path / "checkpoint"), model)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_one_error_names_every_tensor_that_does_not_fit(golden, tmp_path):
    model = build(golden)
    save_checkpoint(model, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.blocks.0.attn_norm.weight"]
    tensors["transformer.blocks.7.ff_out.weight"] = torch.zeros(2)
    tensors["transformer.ln_f.weight"] = torch.zeros(65)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        model.load_checkpoint(tmp_path / "checkpoint")
    message = str(error.value)
    assert "3 tensor(s)" in message
    assert "missing: transformer.blocks.0.attn_norm.weight" in message
    assert "unexpected: transformer.blocks.7.ff_out.weight" in message
    assert "mis-shaped: transformer.ln_f.weight: the model has [64], the checkpoint [65]" in message
    with pytest.raises(CheckpointError, match="1 tensor"):
        load_checkpoint(model, tmp_path / "checkpoint", strict=False)  # a wrong shape is never let through
    tensors["transformer.ln_f.weight"] = torch.full((64,), 3.0)
    save_file(tensors, file)
    (tmp_path / "checkpoint/checksums.json").unlink()
    report = load_checkpoint(model, tmp_path / "checkpoint", strict=False)
    assert report == (["transformer.blocks.0.attn_norm.weight"], ["transformer.blocks.7.ff_out.weight"])
    assert (model.transformer.ln_f.weight == 3).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda old: old[:-1] + bytes([old[-1] ^ 1]), "its content has changed since it was written"),
        ("config.yaml", lambda old: old + b"\n", r"[\d,]+ bytes of [\d,]+"),
        ("tokenizer/tokenizer.json", lambda old: old.replace(b"a", b"b", 1), "its content has changed since it was written"),
        ("tokenizer/tokenizer_config.json", None, "missing"),
        ("checksums.json", lambda _: b"{", "damaged"),
    ],
)
def test_what_fits_the_model_but_is_not_as_it_was_written(golden, tmp_path, name, change, message):
    """It is not loaded, unless its owner says that the change was meant."""
    save_checkpoint(build(golden), tmp_path / "checkpoint")
    file, other = tmp_path / "checkpoint" / name, build(golden, "molmo-qwen2-clip")
    torch.nn.init.zeros_(other.transformer.ff_out.weight)
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    said = rf"checkpoint differs from what was written: {name}: {message}.* Copy or export it again; .* on purpose, delete checksums\.json"
    for load in (load_model, other.load_checkpoint):
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / "checkpoint")
    assert not other.transformer.ff_out.weight.any(), "nothing was loaded"
    (tmp_path / "checkpoint/checksums.json").unlink()
    load_model(tmp_path / "checkpoint")


def test_wrong_places(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        molmo_core.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither config\.yaml"):
        molmo_core.from_pretrained(tmp_path)


def test_a_hub_name_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"allenai/Molmo-7B-D-0924: no such folder here.*[\s\S]*Offline, give the path"):
        molmo_core.from_pretrained("allenai/Molmo-7B-D-0924")


def test_another_class_than_asked_for(golden, tmp_path):
    from molmo_core.models.molmo2 import Molmo2

    save_checkpoint(build(golden), tmp_path / "checkpoint")
    with pytest.raises(TypeError, match="not a Molmo2"):
        Molmo2.from_pretrained(tmp_path / "checkpoint")
