"""Exports against what vLLM's model files ask for: settings by name, files, and every tensor in its place.

vLLM itself needs a GPU and its own torch, so these are its rules in our words, read from vllm/model_executor/models/molmo.py
(commit 0176b7b4) and molmo2.py (030ea52e); other versions may differ. They say which attributes of config.json the modules are
built from, which parameters those have, and how names in the files are changed. A tensor that finds no place, or a place that
stays empty, stops vLLM at load time.
"""

import json
from pathlib import Path

import pytest

from molmo_core.checkpoint.published_export import published_layout_of, write_published_files
from molmo_core.models.base import BaseModelConfig
from molmo_core.preprocessing.tokenizer import Tokenizer
from tests.molmo_core.checkpoint.test_published_keys import CONFIGS, Shapes, stored

# Parts of names, then beginnings of names, each in this order.
MOLMO_PARTS = {
    "image_projector.w1.": "image_projector.gate_proj.", "image_projector.w3.": "image_projector.up_proj.",
    "image_projector.w2.": "image_projector.down_proj.", "att_proj": "self_attn.qkv_proj", "attn_out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "ff_proj": "mlp.gate_up_proj", "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
}  # fmt: skip
MOLMO2_PARTS = {
    "image_pooling_2d.wq": "image_pooling_2d.q_proj", "image_pooling_2d.wk": "image_pooling_2d.k_proj",
    "image_pooling_2d.wv": "image_pooling_2d.v_proj", "image_pooling_2d.wo": "image_pooling_2d.o_proj",
    "image_projector.w1": "image_projector.gate_proj", "image_projector.w3": "image_projector.up_proj",
    "image_projector.w2": "image_projector.down_proj", "att_proj": "qkv_proj", "attn_out": "o_proj", "ff_proj": "up_gate_proj",
    "ff_out": "down_proj", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
}  # fmt: skip
BEGINNINGS = {
    "model.vision_backbone.": "vision_backbone.", "model.transformer.blocks.": "model.layers.", "model.transformer.ln_f.": "model.norm.",
    "model.transformer.mlp.down_proj.": "lm_head.",
}  # fmt: skip

MOLMO_SETTINGS = {
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings",
    "rope_theta", "qkv_bias", "attention_layer_norm", "layer_norm_eps", "layer_norm_type", "norm_after", "embedding_size", "vocab_size",
    "weight_tying",
}  # fmt: skip
MOLMO2_SETTINGS = {
    "text_config": {
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "additional_vocab_size", "qkv_bias",
        "num_hidden_layers", "intermediate_size", "hidden_act", "max_position_embeddings", "rope_theta", "use_qk_norm", "qk_norm_type",
        "layer_norm_eps", "norm_after", "rope_scaling_layers",
    },
    "vit_config": {
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
        "layer_norm_eps", "image_default_input_size", "image_patch_size", "image_num_pos",
    },
    "adapter_config": {
        "vit_layers", "pooling_attention_mask", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
        "intermediate_size", "text_hidden_size",
    },
}  # fmt: skip
MOLMO2_TOKENS = {
    "image_patch_id", "image_col_id", "image_start_token_id", "image_end_token_id", "low_res_image_start_token_id", "image_low_res_id",
    "frame_start_token_id", "frame_end_token_id",
}  # fmt: skip


def loaded(tensors: Shapes, parts: dict[str, str]) -> Shapes:
    """Where vLLM puts the tensors of a file. Both embedding tables become one."""
    names: Shapes = {}
    embedding = [tensors[f"model.transformer.wte.{table}"] for table in ("embedding", "new_embedding")]
    names["model.embed_tokens.weight"] = (sum(shape[0] for shape in embedding), embedding[0][1])
    for name, shape in tensors.items():
        if ".wte." in name:
            continue
        for old, new in parts.items():
            name = name.replace(old, new, 1)
        for old, new in BEGINNINGS.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        assert name not in names
        names[name] = shape
    return names


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def text_model(config: dict, attention: dict, intermediate: int, rows: int, extra: int, up_gate: str) -> Shapes:
    """The language model that vLLM builds; `attention`: head_dim, bias, q/k norm widths or None."""
    d, head = config["hidden_size"], attention["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    names: Shapes = {"model.embed_tokens.weight": (rows + extra, d), "model.norm.weight": (d,), "lm_head.weight": (rows, d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        names |= linear(f"{layer}self_attn.qkv_proj", queries + 2 * keys, d, attention["bias"])
        names |= linear(f"{layer}self_attn.o_proj", d, queries, False)
        names |= {f"{layer}self_attn.{n}_norm.weight": (width,) for n, width in attention["norms"].items()}
        names |= linear(f"{layer}mlp.{up_gate}", 2 * intermediate, d, False) | linear(f"{layer}mlp.down_proj", d, intermediate, False)
        names |= {f"{layer}{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return names


def vision_model(width: int, mlp: int, blocks: int, intermediate: int, d: int, pooling: tuple[str, ...]) -> Shapes:
    names: Shapes = {}
    for i in range(blocks):
        block = f"vision_backbone.image_vit.transformer.resblocks.{i}."
        for name in ("wq", "wk", "wv", "wo"):
            names |= linear(f"{block}attention.{name}", width, width)
        names |= linear(f"{block}feed_forward.w1", mlp, width) | linear(f"{block}feed_forward.w2", width, mlp)
        names |= {f"{block}{norm}.{kind}": (width,) for norm in ("attention_norm", "ffn_norm") for kind in ("weight", "bias")}
    for name in pooling:
        names |= linear(f"vision_backbone.image_pooling_2d.{name}", width, 2 * width if name != pooling[-1] else width)
    for name in ("gate_proj", "up_proj"):
        names |= linear(f"vision_backbone.image_projector.{name}", intermediate, width, False)
    return names | linear("vision_backbone.image_projector.down_proj", d, intermediate, False)


def molmo_in_vllm(config: dict) -> Shapes:
    """`MolmoForCausalLM`; the vision settings of the releases are constants there."""
    assert config.keys() >= MOLMO_SETTINGS
    assert config["layer_norm_type"] == "rms"
    assert not config["weight_tying"]
    d, heads = config["hidden_size"], config["num_attention_heads"]
    head, intermediate = d // heads, config["intermediate_size"] // 2
    norms = {"q": d, "k": config["num_key_value_heads"] * head} if config["attention_layer_norm"] else {}
    attention = {"head_dim": head, "bias": config["qkv_bias"], "norms": norms}
    vit = "vision_backbone.image_vit."
    return (
        text_model(config, attention, intermediate, config["embedding_size"], 128, "gate_up_proj")
        | vision_model(1024, 4096, 23, intermediate, d, ("wq", "wk", "wv", "wo"))
        | {f"{vit}positional_embedding": (577, 1024), f"{vit}class_embedding": (1024,), "vision_backbone.pad_embed": (2, 2048)}
        | {f"{vit}pre_ln.weight": (1024,), f"{vit}pre_ln.bias": (1024,)}
        | linear(f"{vit}patch_embedding", 1024, 588, False)
    )


def molmo2_in_vllm(config: dict) -> Shapes:
    """`Molmo2ForConditionalGeneration`."""
    for part, settings in MOLMO2_SETTINGS.items():
        assert config[part].keys() >= settings, part
    assert config.keys() >= MOLMO2_TOKENS
    text, vit, adapter = config["text_config"], config["vit_config"], config["adapter_config"]
    assert (text["hidden_act"], adapter["hidden_act"]) == ("silu", "silu")
    head = text["head_dim"]
    widths = (head, head) if text["qk_norm_type"] == "qwen3" else (text["num_attention_heads"] * head, text["num_key_value_heads"] * head)
    norms = dict(zip("qk", widths, strict=True)) if text["use_qk_norm"] else {}
    attention = {"head_dim": head, "bias": text["qkv_bias"], "norms": norms}
    total = vit["num_hidden_layers"]
    blocks = max(layer if layer >= 0 else layer + total for layer in adapter["vit_layers"]) + 1
    width, d = vit["hidden_size"], text["hidden_size"]
    assert vit["num_attention_heads"] * vit["head_dim"] == width == adapter["num_attention_heads"] * adapter["head_dim"]
    return (
        text_model(text, attention, text["intermediate_size"], text["vocab_size"], text["additional_vocab_size"], "up_gate_proj")
        | vision_model(width, vit["intermediate_size"], blocks, adapter["intermediate_size"], d, ("q_proj", "k_proj", "v_proj", "o_proj"))
        | {"vision_backbone.image_vit.positional_embedding": (vit["image_num_pos"], width)}
        | linear("vision_backbone.image_vit.patch_embedding", width, 3 * vit["image_patch_size"] ** 2)
    )


def exported(name: str, folder: Path, golden: Path) -> tuple[dict, Shapes]:
    config = BaseModelConfig.load(CONFIGS / f"{name}.yaml")
    tokenizer = Tokenizer.load(golden / "tokenizer", layout=config.LAYOUT)
    write_published_files(folder, config, published_layout_of(config), tokenizer, "bfloat16")
    return json.loads((folder / "config.json").read_text()), stored(config)


@pytest.mark.parametrize("name", ["molmo-7b-d", "molmo-7b-o", "molmo-72b"])
def test_molmo(name, golden, tmp_path):
    config, tensors = exported(name, tmp_path, golden)
    assert config["architectures"] == ["MolmoForCausalLM"]
    assert {"AutoConfig", "AutoModelForCausalLM"} <= config["auto_map"].keys(), "transformers has no class of this model: remote code"
    assert loaded(tensors, MOLMO_PARTS) == molmo_in_vllm(config)
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {"AutoProcessor", "AutoImageProcessor"} <= images["auto_map"].keys()
    names = ("base_image_input_size", "image_patch_size", "image_token_length_h", "image_token_length_w", "max_crops", "overlap_margins")
    assert [images[n] for n in names] == [[336, 336], 14, 12, 12, 12, [4, 4]]


@pytest.mark.parametrize("name", ["molmo2-4b", "molmo2-8b", "molmo2-o-7b"])
def test_molmo2(name, golden, tmp_path):
    config, tensors = exported(name, tmp_path, golden)
    assert (config["architectures"], config["model_type"]) == (["Molmo2ForConditionalGeneration"], "molmo2")
    assert "AutoConfig" in config["auto_map"], "transformers' own configuration class has no vit_config, which vLLM asks for"
    assert loaded(tensors, MOLMO2_PARTS) == molmo2_in_vllm(config)
    images, videos, processor = (
        json.loads((tmp_path / f"{kind}_config.json").read_text()) for kind in ("preprocessor", "video_preprocessor", "processor")
    )
    assert images.keys() >= {"max_crops", "overlap_margins", "patch_size", "pooling_size", "size"}
    assert videos.keys() >= {"num_frames", "max_fps", "frame_sample_mode", "sampling_fps", "patch_size", "pooling_size", "size"}
    assert processor.keys() >= {"image_use_col_tokens", "use_single_crop_col_tokens", "use_single_crop_start_token",
                                "video_use_col_tokens", "use_frame_special_tokens"}  # fmt: skip
    for file in (images, videos, processor):
        assert "AutoProcessor" in file["auto_map"]


def test_the_tokenizer_has_the_tokens_vllm_looks_up(golden, tmp_path):
    exported("molmo2-4b", tmp_path, golden)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    names = {token["content"] for token in added}
    assert {"<|image|>", "<|video|>", "<im_patch>", "<im_col>", "<im_start>", "<im_end>", "<low_res_im_start>",
            "<frame_start>", "<frame_end>", "<im_low>"} <= names  # fmt: skip
