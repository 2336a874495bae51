"""Text and vision checkpoints of transformers as initialisation: same logits, same hidden states."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from molmo_core.checkpoint import CheckpointError
from molmo_core.checkpoint.backbones import initialise_backbones, load_llm, load_vit
from molmo_core.models.molmo import MolmoConfig
from molmo_core.nn.configs import LlmConfig, MolmoVisionBackboneConfig, VitConfig
from molmo_core.nn.connector import patchify

TEXT = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48,
    "vocab_size": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip
LLM = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 96, "vocab_size": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# name -> transformers' classes, their settings, ours
LLMS = {
    "qwen2": ("Qwen2", {}, {"qkv_bias": True}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "weight_tying": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}, {"head_dim": 16, "attention_layer_norm": True, "attention_layer_norm_type": "qwen3"}),
    "olmo2": ("Olmo2", {}, {"attention_layer_norm": True, "norm_after": True}),
    "olmo3": ("Olmo3", {}, {"attention_layer_norm": True, "norm_after": True, "rope_theta": 500000.0}),
    "llama": ("Llama", {}, {"block_type": "llama"}),
    "llama3-fused": ("Llama", {"rope_parameters": LLAMA3}, {
        "rope_type": "llama3", "rope_theta": 500000.0, "rope_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
        "rope_original_max_position_embeddings": 16,
    }),
    "olmoe": ("Olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}, {
        "n_kv_heads": 4, "block_type": "moe", "moe_num_experts": 4, "moe_top_k": 2, "attention_layer_norm": True,
    }),
}  # fmt: skip


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that show in the result, norms and biases included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    return model.eval()


def text_checkpoint(name: str, folder: Path) -> torch.nn.Module:
    kind, settings, _ = LLMS[name]
    config = getattr(transformers, f"{kind}Config")(**{**TEXT, **settings})
    model = randomised(getattr(transformers, f"{kind}ForCausalLM")(config))
    model.save_pretrained(folder)
    return model


def text_model(**llm) -> torch.nn.Module:
    return MolmoConfig(llm=LlmConfig.new(**{**LLM, **llm}), vision_backbone=None).build_model().eval()


@pytest.mark.parametrize("name", LLMS)
def test_text_checkpoints_give_the_same_logits(name, tmp_path):
    theirs = text_checkpoint(name, tmp_path)
    model = text_model(**LLMS[name][2], init_path=str(tmp_path))
    special = model.transformer.wte.new_embedding.clone()
    assert initialise_backbones(model) == [f"language model from {tmp_path}"]
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = theirs(ids).logits, model(ids).logits
    assert expected.std() > 0.1
    assert torch.allclose(logits, expected, atol=1e-4)
    assert torch.equal(model.transformer.wte.new_embedding, special), "the special tokens keep their values"


def test_another_architecture_is_named_setting_by_setting(tmp_path):
    text_checkpoint("qwen2", tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_llm(text_model(n_heads=8, n_kv_heads=4, head_dim=4, norm_after=True), tmp_path)
    assert all(part in str(error.value) for part in ("llm.n_heads=8, the checkpoint has 4", "llm.norm_after", "llm.qkv_bias"))
    assert "d_model" not in str(error.value)


def test_another_rotary_base_is_warned_of(tmp_path):
    text_checkpoint("qwen2", tmp_path)
    with pytest.warns(UserWarning, match=r"rope_theta=10000.0, the configuration says llm.rope_theta=1000000.0"):
        load_llm(text_model(qkv_bias=True, rope_theta=1e6), tmp_path)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    text_checkpoint("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_llm(text_model(qkv_bias=True), tmp_path)
    assert "missing: transformer.blocks.1.ff_proj.weight" in str(error.value)
    assert "unexpected: model.layers.1.extra.weight" in str(error.value)


def test_unknown_families_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_llm(text_model(), tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_llm(text_model(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="gpt2"):
        load_llm(text_model(), tmp_path)


VISION = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "image_size": 56, "patch_size": 14}
VIT = {
    "image_default_input_size": (56, 56), "image_emb_dim": 32, "image_num_heads": 4, "image_num_key_value_heads": 4, "image_head_dim": 8,
    "image_num_layers": 4,
}  # fmt: skip
VITS = {
    "clip": ("CLIPVision", {"intermediate_size": 48}, {"image_model_type": "openai", "image_mlp_dim": 48, "image_num_pos": 17}),
    "siglip": ("SiglipVision", {"intermediate_size": 48}, {
        "image_model_type": "siglip", "image_mlp_dim": 48, "image_num_pos": 16, "image_mlp_activations": "gelu_pytorch_tanh",
        "image_norm_eps": 1e-6,
    }),
    "dino": ("Dinov2", {"mlp_ratio": 2}, {
        "image_model_type": "dino", "image_mlp_dim": 64, "image_num_pos": 17, "image_mlp_activations": "gelu", "image_norm_eps": 1e-6,
    }),
}  # fmt: skip


def vision_model(name: str, layers: list[int], init_path: str | None = None, **changes) -> torch.nn.Module:
    vit = VitConfig.new(**{**VIT, **VITS[name][2], **changes}, init_path=init_path)
    return MolmoConfig(llm=LlmConfig.new(**LLM), vision_backbone=MolmoVisionBackboneConfig(vit=vit, vit_layers=layers)).build_model().eval()


def vision_checkpoint(name: str, folder: Path, **changes) -> torch.nn.Module:
    kind, settings, _ = VITS[name]
    config = getattr(transformers, f"{kind}Config")(**{**VISION, **settings, **changes})
    model = randomised(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", VITS)
def test_vision_checkpoints_give_the_same_hidden_states(name, tmp_path):
    theirs = vision_checkpoint(name, tmp_path)
    model = vision_model(name, [2, 0], init_path=str(tmp_path))  # block 3 is not built
    assert initialise_backbones(model) == [f"vision encoder from {tmp_path}"]
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states[1:]
        outputs = model.vision_backbone.image_vit(patchify(images, 14))
    assert len(outputs) == 3
    for ours, reference in zip(outputs, expected, strict=False):
        assert torch.allclose(ours, reference, atol=1e-4)


@pytest.mark.parametrize("name", ["siglip", "dino"])
def test_positions_of_another_grid_are_interpolated(name, tmp_path):
    theirs = vision_checkpoint(name, tmp_path, image_size=98)
    model = vision_model(name, [2, 0])
    load_vit(model, tmp_path)
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    more = {"interpolate_pos_encoding": True} if name == "siglip" else {}
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True, **more).hidden_states[1]
        assert torch.allclose(model.vision_backbone.image_vit(patchify(images, 14))[0], expected, atol=1e-4)


def test_the_vision_half_of_a_two_tower_checkpoint(tmp_path):
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 32,
                     "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**VISION, "intermediate_size": 48}, projection_dim=8,
    )  # fmt: skip
    theirs = randomised(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    model = vision_model("clip", [2, 0])
    load_vit(model, tmp_path)
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = theirs.vision_model(images, output_hidden_states=True).hidden_states[3]
        assert torch.allclose(model.vision_backbone.image_vit(patchify(images, 14))[2], expected, atol=1e-4)


def test_the_wrong_encoder_is_refused(tmp_path):
    vision_checkpoint("dino", tmp_path)
    with pytest.raises(CheckpointError, match="no siglip encoder"):
        load_vit(vision_model("siglip", [2, 0]), tmp_path)
    vision_checkpoint("siglip", tmp_path / "siglip")
    with pytest.raises(CheckpointError, match=r"num_attention_heads=\d, the configuration has vit\.image_num_heads=2"):
        load_vit(vision_model("siglip", [2, 0], image_num_heads=2, image_num_key_value_heads=2, image_head_dim=16), tmp_path / "siglip")
    with pytest.raises(CheckpointError, match=r"hidden_act='gelu_pytorch_tanh', the configuration has vit\.image_mlp_activations='gelu'"):
        load_vit(vision_model("siglip", [2, 0], image_mlp_activations="gelu"), tmp_path / "siglip")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "activation='silu', the checkpoint has 'gelu'"),
        ("olmoe", {"norm_topk_prob": True}, "renormalised weights of experts=False, the checkpoint has True"),
        ("olmoe", {"clip_qkv": 8.0}, r"llm\.clip_qkv=None, the checkpoint has 8\.0"),
    ],
)
def test_settings_that_shapes_do_not_show(name, change, message, tmp_path):
    text_checkpoint(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_llm(text_model(**LLMS[name][2]), tmp_path)
