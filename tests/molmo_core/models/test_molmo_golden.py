"""The published implementations' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from molmo_core.checkpoint import from_pretrained
from molmo_core.models.base import BaseModelConfig
from molmo_core.models.molmo import Molmo, MolmoConfig

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


@pytest.mark.parametrize("name", DENSE)
def test_from_a_picture_to_text(golden, name):
    """The example of the API document, with a raw image: the published tokens come out."""
    model = load_golden(golden / name)
    preprocessor = model.config.build_preprocessor(for_inference=True)
    image = np.load(golden / name / "images.npz")["image0"]
    inputs = preprocessor({"image": image, "messages": ["Point to the dogs."]})
    expected = load_file(golden / name / "expected.safetensors")["greedy"][0]
    generated = model.generate(**inputs, max_new_tokens=12)
    assert torch.equal(generated.token_ids, expected)
    assert generated.text == [model.tokenizer.decode(expected[0].tolist())]
    if "image_masks" not in inputs:  # then the image alone says everything: its index follows from the image tokens
        bare = {"input_ids": inputs["input_ids"], "images": inputs["images"]}
        assert torch.equal(model.generate(**bare, max_new_tokens=12).token_ids, expected)
        torch.testing.assert_close(model(**bare).logits, model(**{k: v for k, v in inputs.items() if k != "metadata"}).logits)


def test_overrides_of_the_api_document(golden):
    """`vision_backbone.image_model_type` changes the encoder's kind and keeps its sizes."""
    overrides = ["llm.n_layers=1", "vision_backbone.image_model_type=siglip"]
    model = Molmo(MolmoConfig.load(golden / "molmo-qwen2-clip" / "config.yaml", overrides=overrides)).eval()
    assert len(model.transformer.blocks) == 1
    inputs = model.config.build_preprocessor(for_inference=True)({"image": np.zeros((60, 80, 3), np.uint8), "messages": ["What?"]})
    assert "image_masks" not in inputs
    assert model(input_ids=inputs["input_ids"], images=inputs["images"]).logits.shape == (1, len(inputs["input_ids"]), 448)
