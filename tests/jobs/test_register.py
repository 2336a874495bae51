"""Registering a checkpoint: a new version each time, the alias on the last one."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.register import app
from pipelines import tracking
from pipelines.registry.config import RegisterConfig
from pipelines.registry.register import register


@pytest.fixture
def checkpoint(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def test_versions_and_alias(checkpoint, tmp_path):
    config = tmp_path / "register.yaml"
    config.write_text("checkpoint: model\nname: tiny\n")
    for version in ("1", "2"):
        result = CliRunner().invoke(app, [str(config)])
        assert result.exit_code == 0, result.output
        assert f"Registered tiny version {version} as models:/tiny@champion" in result.output
    assert tracking.versioned("models:/tiny@champion") == "models:/tiny/2"
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert (tracking.resolve("models:/tiny@champion") / "model.safetensors").read_bytes() == weights
    result = register(RegisterConfig(str(checkpoint), "tiny", alias="candidate"))
    assert result == {"name": "tiny", "version": "3", "alias": "candidate", "uri": "models:/tiny@candidate"}
    assert tracking.versioned("models:/tiny@champion") == "models:/tiny/2"


def test_not_a_checkpoint(checkpoint, tmp_path):
    config = tmp_path / "register.yaml"
    config.write_text("checkpoint: elsewhere\nname: tiny\n")
    result = CliRunner().invoke(app, [str(config)])
    assert result.exit_code == 2
    assert "elsewhere: no such file or folder" in result.stderr


@pytest.mark.parametrize(
    ("setting", "told"), [("name=a/b", "name='a/b': "), ("alias=two words", "alias='two words': "), ("alias=latest", "reserved")]
)
def test_a_name_that_mlflow_refuses_is_told_before_anything_is_written(checkpoint, tmp_path, setting, told):
    config = tmp_path / "register.yaml"
    config.write_text("checkpoint: model\nname: tiny\n")
    result = CliRunner().invoke(app, [str(config), setting])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)
    assert told in result.stderr
    assert not (tmp_path / "mlflow.db").exists()


def test_damaged_weights_are_told_before_anything_is_written(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    config = tmp_path / "register.yaml"
    config.write_text("checkpoint: model\nname: tiny\n")
    result = CliRunner().invoke(app, [str(config)])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "mlflow.db").exists()
