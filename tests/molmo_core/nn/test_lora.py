"""Adapters: what is added, that they begin with nothing, and that merged they compute the same."""

import pytest
import torch

from molmo_core.checkpoint.loading import load_model
from molmo_core.nn.lora import LoraLinear, adapted_layers, is_adapter
from molmo_core.registry import BaseModelConfig

ALL = ("connector", "vit", "llm")


@pytest.fixture
def folder(golden):
    return golden / "molmo-qwen2-clip"


def some(model):
    """A batch of images and texts."""
    preprocessor = model.config.build_preprocessor(for_inference=False, is_training=False)
    pixels = torch.arange(70 * 110 * 3).to(torch.uint8).reshape(70, 110, 3).numpy()
    rows = [{"image": pixels, "question": "How many?", "answer": "3", "style": "demo"}, {"messages": ["Hello?", "Yes."]}]
    return model.config.build_collator(None, None, include_metadata=False)([preprocessor(row) for row in rows])


def trained(model):
    """Adapters as if they had been trained."""
    torch.manual_seed(0)
    for layer in adapted_layers(model):
        layer.reset_adapter()
        torch.nn.init.normal_(layer.lora_b, std=0.02)
    return model


def test_adapters_begin_with_nothing_and_merged_are_the_same(folder, tmp_path):
    plain = load_model(folder, torch.float32)
    batch = some(plain)
    model = load_model(folder, torch.float32)
    model.add_adapters(ALL, rank=4, alpha=8.0)
    for layer in adapted_layers(model):
        layer.reset_adapter()
    with torch.no_grad():
        before = plain(**batch).logits
        assert torch.equal(model(**batch).logits, before)
        adapted = trained(model)(**batch).logits
        assert (adapted - before).abs().max() > 0.01
        with pytest.raises(ValueError, match="merge_adapters"):
            model.save_checkpoint(tmp_path / "model")
        model.merge_adapters()
        torch.testing.assert_close(model(**batch).logits, adapted, rtol=1e-5, atol=1e-5)
        model.save_checkpoint(tmp_path / "model")
        saved = load_model(tmp_path / "model")
        assert next(adapted_layers(saved), None) is None
        torch.testing.assert_close(saved(**batch).logits, adapted, rtol=1e-5, atol=1e-5)


def test_where_they_are(folder):
    """Attention and feed-forward layers of the parts that are chosen; embeddings, norms and the head have none."""
    model = load_model(folder, torch.float32)
    model.add_adapters(("llm", "connector"), rank=4, alpha=8.0)
    names = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    block = {f"transformer.blocks.0.{name}" for name in ("att_proj", "attn_out", "ff_proj", "ff_out")}
    pooling = {f"vision_backbone.image_pooling_2d.{name}" for name in ("wq", "wk", "wv", "wo")}
    projector = {f"vision_backbone.image_projector.{name}" for name in ("w1", "w2", "w3")}
    assert {name for name in names if not name.startswith("transformer.blocks.") or ".0." in name} == block | pooling | projector
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
    width = model.config.llm.d_model
    assert shapes["transformer.blocks.0.attn_out.lora_b"] == (width, 4)
    assert len(shapes) == 2 * len(names)


@pytest.mark.parametrize(
    ("name", "overrides"), [("he-molmo", []), ("molmo-point/a", ["data_formatter.debug=false"]), ("video-olmo/per-frame", [])]
)
def test_every_model_of_the_family_takes_them(golden, name, overrides):
    with torch.device("meta"):
        model = BaseModelConfig.load(golden / name / "config.yaml", overrides).build_model()
    model.add_adapters(ALL, rank=2, alpha=2.0)
    names = [name for group in model.parameter_groups().values() for name, _ in group if is_adapter(name)]
    assert any("blocks" in name for name in names)
    assert any("resblocks" in name for name in names)
    assert any("image_projector" in name for name in names)
