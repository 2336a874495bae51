"""`python -m jobs.export`."""

import pytest
import torch
from typer.testing import CliRunner

from jobs.export import app
from molmo_core.checkpoint import from_pretrained, save_checkpoint
from molmo_core.models.base import BaseModelConfig
from molmo_core.models.molmo2 import Molmo2Config
from tests.molmo_core.checkpoint.tiny_molmo2 import our_config


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def molmo2_checkpoint(golden, tmp_path):
    torch.set_num_threads(1)
    model = Molmo2Config.from_dict(our_config(str(golden / "tokenizer"), "qwen3", False)).build_model()
    save_checkpoint(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_huggingface_export_is_written_verified_and_says_so(molmo2_checkpoint, tmp_path):
    result = run(molmo2_checkpoint, tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "read back by molmo_core" in result.output
    assert "read back by transformers" in result.output
    assert result.output.count("verified") == 3  # the tensors, and the logits of two readers
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
        "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    }  # fmt: skip
    assert next(from_pretrained(tmp_path / "out").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["molmo-qwen2-clip", "video-olmo/per-frame", "he-molmo"])
def test_native_export(golden, tmp_path, name):
    save_checkpoint(BaseModelConfig.load(golden / name / "config.yaml").build_model(), tmp_path / "checkpoint")
    result = run(tmp_path / "checkpoint", tmp_path / "out", "--format", "native")
    assert result.exit_code == 0, result.output
    assert "verified" in result.output
    assert (tmp_path / "out/config.yaml").is_file()


def test_errors_are_one_line(molmo2_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    result = run(molmo2_checkpoint, tmp_path / "out")
    assert result.exit_code == 2
    assert "exists; an export goes to a new folder" in result.output
    assert "Traceback" not in result.output
    assert run(tmp_path / "nowhere", tmp_path / "other").exit_code == 2
