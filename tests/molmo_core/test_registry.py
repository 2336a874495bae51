"""Which model is this path: every kind is told from the others, in one place."""

import json
import shutil

import pytest
import torch

import molmo_core
from molmo_core.checkpoint import CheckpointError, load_model
from molmo_core.checkpoint.export import export_checkpoint
from molmo_core.checkpoint.folder import Published, locate
from molmo_core.config import ConfigError
from molmo_core.models.base import ModelBase
from molmo_core.registry import MODELS, BaseModelConfig, config_class

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "allenai/Molmo-7B-D-0924", "r": 8}


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    """The tiny model in the published layout."""
    return export_checkpoint(tiny_model, tmp_path_factory.mktemp("published") / "model")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_by_name(name):
    config = config_class(name)()
    assert config.model_name == name
    assert issubclass(config.model_class, ModelBase)
    assert getattr(molmo_core, type(config).__name__) is type(config)
    assert getattr(molmo_core, config.model_class.__name__) is config.model_class


def test_names_of_the_package():
    assert {name for name in molmo_core.__all__ if getattr(molmo_core, name) is None} == set()
    assert set(molmo_core.__all__) <= set(dir(molmo_core))
    with pytest.raises(AttributeError, match="no attribute 'Molmo3'"):
        molmo_core.Molmo3  # noqa: B018


@pytest.mark.parametrize("kind", ["file", "own", "published"])
def test_kinds_of_paths(kind, tiny_model, tiny_checkpoint, published):
    """The same model from its file, its own folder and its published folder; overrides reach into each."""
    path = {"file": tiny_checkpoint / "config.yaml", "own": tiny_checkpoint, "published": published}[kind]
    assert isinstance(locate(path, weights=False), Published) == (kind == "published")
    config = BaseModelConfig.load(path, ["llm.max_sequence_length=1234", "mm_preprocessor.max_crops=3"])
    assert (config.llm.max_sequence_length, config.mm_preprocessor.max_crops) == (1234, 3)
    plain = BaseModelConfig.load(path)
    assert (plain.llm.d_model, plain.llm.max_sequence_length) == (tiny_model.config.llm.d_model, 16384)
    assert plain.build_tokenizer().encode("How many dogs?") == BaseModelConfig.load(tiny_checkpoint).build_tokenizer().encode(
        "How many dogs?"
    )
    with pytest.raises(ConfigError, match=r"unknown key 'llm.d_modell'. Did you mean 'd_model'"):
        BaseModelConfig.load(path, ["llm.d_modell=3"])
    with pytest.raises(ConfigError, match="not of the form key=value"):
        BaseModelConfig.load(path, ["llm.d_model"])
    with pytest.raises(ConfigError, match="is a MolmoConfig, not a VideoOlmoConfig"):
        molmo_core.VideoOlmoConfig.load(path)


def test_weights_of_both_layouts(tiny_model, tiny_checkpoint, published):
    ours = tiny_model.state_dict()
    for path in (tiny_checkpoint, published):
        theirs = load_model(path).state_dict()
        assert set(theirs) == set(ours)
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    with pytest.raises(CheckpointError, match="is a file with a configuration; weights are in a checkpoint folder"):
        load_model(tiny_checkpoint / "config.yaml")


def test_golden_published_folder(golden):
    config = BaseModelConfig.load(golden / "hub-molmoe")
    assert (config.model_name, config.llm.block_type) == ("molmo", "moe")
    assert load_model(golden / "hub-molmoe").config == config


def adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "adapter_model.safetensors").write_bytes(b"")


def other_architecture(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}))


def one_folder_too_high(folder):
    (folder / "step_000020" / "model").mkdir(parents=True)
    (folder / "step_000020" / "model" / "config.yaml").write_text("model_name: molmo\n")


WRONG = {
    "adapter": (adapter, r"a PEFT adapter \(LoRA\) of allenai/Molmo-7B-D-0924, not a model of its own\. Merge it"),
    "adapter beside a config.json": (lambda f: (adapter(f), other_architecture(f)), "a PEFT adapter"),
    "other architecture": (other_architecture, r"config\.json: model_type 'llava' is not a Molmo model \(molmo, molmo2, molmo_point\)"),
    "damaged config.json": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not readable as a JSON object"),
    "empty": (lambda f: None, r"neither config\.yaml .* nor config\.json .*\(this one is empty\)"),
    "other files": (lambda f: (f / "readme.md").write_text("x"), r"neither config\.yaml .*\(this one has readme\.md\)"),
    "one folder too high": (lambda f: one_folder_too_high(f), r"neither config\.yaml .* there; give the folder that holds one"),
    "two files away": (lambda f: one_folder_too_high(f / "run"), r"neither config\.yaml"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("read", [BaseModelConfig.load, load_model], ids=["configuration", "model"])
def test_what_is_not_a_model(kind, read, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    make, message = WRONG[kind]
    make(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        read(folder)
    assert str(folder) in str(error.value)


def test_the_folder_below_is_named(tmp_path):
    one_folder_too_high(tmp_path)
    with pytest.raises(CheckpointError, match=r"give the folder that holds one: .*step_000020/model"):
        locate(tmp_path / "step_000020")


@pytest.mark.parametrize("read", [BaseModelConfig.load, load_model], ids=["configuration", "model"])
def test_paths_that_do_not_exist(read, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder \(and not the name of a hub repository"):
        read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"nowhere\.yaml: no such configuration file"):
        read("configs/nowhere.yaml")
    with pytest.raises(CheckpointError, match=r"allenai/Molmo-7B-D-0924: no such folder here, .*Offline, give the path of a folder with"):
        read("allenai/Molmo-7B-D-0924")


def test_a_hub_repository_from_its_cache(tmp_path, monkeypatch, published):
    """What huggingface_hub keeps locally is found by name, without a connection; a configuration needs no weights there."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / revision
    shutil.copytree(published, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert BaseModelConfig.load("someone/tiny").llm.max_sequence_length == 16384
    shutil.copy(published / "model.safetensors", snapshot)
    assert load_model("someone/tiny").config.llm.max_sequence_length == 16384
