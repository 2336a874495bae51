"""Reading a training configuration: parts in other files, overrides that reach into them, errors."""

import pytest
from batches import GOLDEN, tiny_config

from molmo_core.config import ConfigError
from pipelines.training.config import TrainConfig, pinned


@pytest.fixture
def file(tmp_path):
    (tmp_path / "data.yaml").write_text("datasets: {shapes: {path: prepared}}\n")
    (tmp_path / "prepared").mkdir()
    path = tmp_path / "train.yaml"
    path.write_text(f"name: run\nsteps: 10\nmodel: {GOLDEN}/molmo-qwen2-clip/config.yaml\ndata: data.yaml\nglobal_batch_size: 4\n")
    return path


def test_parts_come_from_their_files_and_overrides_reach_them(file, tmp_path):
    config = TrainConfig.load(file, ["model.llm.n_layers=1", "data.shuffle=false", "steps=7", "optim.llm.lr=0.5"])
    assert (config.model.llm.n_layers, config.data.shuffle, config.steps, config.optim.llm.lr) == (1, False, 7, 0.5)
    assert config.data.datasets["shapes"].path == str(tmp_path / "prepared")
    assert config.optim.connector.lr == 2e-4


def test_saved_and_loaded_it_is_the_same(file, tmp_path):
    config = TrainConfig.load(file)
    config.save(tmp_path / "saved.yaml")
    again = TrainConfig.load(tmp_path / "saved.yaml", ["model.llm.n_heads=2"])
    assert again.model.llm.n_heads == 2
    again.model.llm.n_heads = config.model.llm.n_heads
    assert again == config


def test_a_checkpoint_folder_gives_model_and_weights(file):
    folder = GOLDEN / "molmo-qwen2-clip"
    config = TrainConfig.load(file, [f"model={folder}"])
    assert config.init_from == str(folder)
    assert config.model.llm.vocab_size == 406


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key 'stepz'. Did you mean 'steps'"),
        ("model.llm.nlayers=3", "unknown key 'llm.nlayers'. Did you mean 'n_layers'"),
        ("data.shufle=true", "unknown key 'shufle'. Did you mean 'shuffle'"),
        ("optim.llm.lr=fast", r"optim.llm.lr: Input should be a valid number.*got 'fast'"),
        ("num_workers=3", "global_batch_size=4 is not a multiple of num_workers=3"),
        ("device_batch_size=3", "device_batch_size=3 does not divide a worker's share of 4"),
        ("steps=0", "steps=0 must be at least 1"),
        ("optim.schedule.hold=1", r"hold=1 must be below 1"),
        ("name=a/b", "name='a/b' must be the name of a folder"),
        ("name=..", "name='..' must be the name of a folder"),
        ("name=''", "name='' must be the name of a folder"),
        (f"name={'ä' * 101}", "at most 200 bytes"),
        ("model=missing.yaml", "missing.yaml: no such configuration file"),
    ],
)
def test_errors_name_the_key(file, override, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.load(file, [override])


def test_identity_ignores_what_does_not_change_the_result(tmp_path):
    base = tiny_config(tmp_path).identity()
    assert tiny_config(tmp_path, num_workers=2, steps=99, device_batch_size=1, log_interval=5).identity() == base
    assert tiny_config(tmp_path, seed=1).identity() != base
    assert tiny_config(tmp_path, global_batch_size=8).identity() != base


def test_paths_are_pinned_where_they_exist(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.load(file)
    config.data.datasets["shapes"].path = "prepared"
    config.init_from = "models:/shapes@champion"
    pinned(config)
    assert config.data.datasets["shapes"].path == str(tmp_path / "prepared")
    assert config.init_from == "models:/shapes@champion"
