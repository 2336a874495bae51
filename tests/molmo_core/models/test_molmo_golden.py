"""The published implementations' numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molmo_core.checkpoint import from_pretrained
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


def test_mixture_of_experts(golden):
    """MolmoE as published: hub names, position-style image index, float16 pixels.

    The published remote code drops a crop if any of its values is exactly -1, its mark of padding. Every crop of this golden batch happens
    to hold such a (random) value, so the reference saw blank crops; normalised photographs hold none.
    """
    model = from_pretrained(golden / "hub-molmoe", dtype=torch.float32)
    model.vision_backbone.image_vit.register_forward_hook(lambda module, args, outputs: [0 * o for o in outputs])
    batch = load_file(golden / "hub-molmoe" / "batch.safetensors")
    expected = load_file(golden / "hub-molmoe" / "expected.safetensors")["logits"]
    with torch.no_grad():
        logits = model(**batch).logits[:, ::8]
    real = (batch["input_ids"] >= 0)[:, ::8]
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)
    flat = {**batch, "image_input_idx": batch["image_input_idx"].flatten(1)}
    with torch.no_grad():
        torch.testing.assert_close(model(**flat).logits[:, ::8], logits, atol=0, rtol=0)
