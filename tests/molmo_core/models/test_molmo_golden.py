"""The published implementations' numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molmo_core.models.base import BaseModelConfig
from molmo_core.models.molmo import Molmo

DENSE = ["molmo-qwen2-clip", "molmo-olmo-clip", "molmo-qwen2-siglip-bidir", "molmo-qwen2-dino"]


def load_golden(folder: Path) -> Molmo:
    model = BaseModelConfig.load(folder / "config.yaml").build_model().eval()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return model


@pytest.mark.parametrize("name", DENSE)
def test_logits(golden, name):
    model = load_golden(golden / name)
    batch = load_file(golden / name / "batch.safetensors")
    expected = load_file(golden / name / "expected.safetensors")["logits"]
    with torch.no_grad():
        output = model(**batch)
    real = batch["input_ids"] >= 0
    torch.testing.assert_close(output.logits[real], expected[real], atol=1e-4, rtol=0)
