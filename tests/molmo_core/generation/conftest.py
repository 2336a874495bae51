"""Golden models and their inputs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molmo_core.checkpoint import load_checkpoint
from molmo_core.models.base import BaseModelConfig, ModelBase


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_model(golden: Path):
    """Builds the model of a golden folder with its weights: `golden_model("molmo-qwen2-clip")`."""
    models: dict[str, ModelBase] = {}

    def build(name: str) -> ModelBase:
        if name not in models:
            model = BaseModelConfig.load(golden / name / "config.yaml").build_model().eval()
            load_checkpoint(model, golden / name / "model.safetensors")
            models[name] = model
        return models[name]

    return build


@pytest.fixture
def tensors(golden: Path):
    """Tensors of a golden file: `tensors("molmo-qwen2-clip", "prompt")`."""
    return lambda name, part: load_file(golden / name / f"{part}.safetensors")
