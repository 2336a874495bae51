"""Every published model at full size, without memory: tensor names and shapes as published."""

import json
import re
from pathlib import Path

import pytest
import torch

from molmo_core.checkpoint.folder import Published
from molmo_core.checkpoint.layouts import published_links
from molmo_core.checkpoint.links import export_specs, model_tensors
from molmo_core.checkpoint.published_config import read_published_config
from molmo_core.checkpoint.published_export import published_layout_of, write_published_files
from molmo_core.preprocessing.tokenizer import Tokenizer
from molmo_core.registry import BaseModelConfig, config_class

CONFIGS = Path(__file__).parents[3] / "configs/models"
Shapes = dict[str, tuple[int, ...]]
# Stored parameters. Molmo2-4B is tied here; its published file holds a copy of the embedding as output head.
TOTALS = {
    "molmoe-1b": 7_221_875_712, "molmo-7b-o": 7_665_032_192, "molmo-7b-d": 8_021_025_280, "molmo-72b": 73_308_285_952,
    "molmo2-4b": 4_850_869_200, "molmo2-8b": 8_661_703_120, "molmo2-o-7b": 7_760_786_896,
}  # fmt: skip


def vision(prefix: str, width: int, mlp: int, blocks: int, positions: int, clip: bool, d_model: int, intermediate: int) -> Shapes:
    """Encoder and connector of the published checkpoints."""
    vit, pooled = f"{prefix}image_vit.", 2 * width
    shapes: Shapes = {f"{vit}positional_embedding": (positions, width), f"{vit}patch_embedding.weight": (width, 588)}
    if clip:
        shapes |= {f"{vit}class_embedding": (width,), f"{prefix}pad_embed": (2, pooled)}
        shapes |= {f"{vit}pre_ln.{kind}": (width,) for kind in ("weight", "bias")}
    else:
        shapes[f"{vit}patch_embedding.bias"] = (width,)
    for r in range(blocks):
        block = f"{vit}transformer.resblocks.{r}."
        for name in ("wq", "wk", "wv", "wo"):
            shapes |= {f"{block}attention.{name}.weight": (width, width), f"{block}attention.{name}.bias": (width,)}
        shapes |= {f"{block}feed_forward.w1.weight": (mlp, width), f"{block}feed_forward.w1.bias": (mlp,)}
        shapes |= {f"{block}feed_forward.w2.weight": (width, mlp), f"{block}feed_forward.w2.bias": (width,)}
        shapes |= {f"{block}{norm}.{kind}": (width,) for norm in ("attention_norm", "ffn_norm") for kind in ("weight", "bias")}
    for name in ("wq", "wk", "wv"):
        shapes |= {f"{prefix}image_pooling_2d.{name}.weight": (width, pooled), f"{prefix}image_pooling_2d.{name}.bias": (width,)}
    shapes |= {f"{prefix}image_pooling_2d.wo.weight": (width, width), f"{prefix}image_pooling_2d.wo.bias": (width,)}
    shapes |= {f"{prefix}image_projector.{name}.weight": (intermediate, width) for name in ("w1", "w3")}
    return shapes | {f"{prefix}image_projector.w2.weight": (d_model, intermediate)}


def dense(d: int, layers: int, q: int, kv: int, intermediate: int, rows: int, bias: bool, qk_norm: bool) -> Shapes:
    """Molmo-7B-D, 7B-O, 72B."""
    text = "model.transformer."
    shapes: Shapes = {f"{text}wte.embedding": (rows, d), f"{text}wte.new_embedding": (128, d), f"{text}ln_f.weight": (d,)}
    shapes[f"{text}ff_out.weight"] = (rows, d)
    for i in range(layers):
        block = f"{text}blocks.{i}."
        shapes |= {f"{block}att_proj.weight": (q + 2 * kv, d), f"{block}attn_out.weight": (d, q)}
        shapes |= {f"{block}ff_proj.weight": (2 * intermediate, d), f"{block}ff_out.weight": (d, intermediate)}
        shapes |= {f"{block}{norm}.weight": (d,) for norm in ("attn_norm", "ff_norm")}
        if bias:
            shapes[f"{block}att_proj.bias"] = (q + 2 * kv,)
        if qk_norm:
            shapes |= {f"{block}q_norm.weight": (q,), f"{block}k_norm.weight": (kv,)}
    return shapes | vision("model.vision_backbone.", 1024, 4096, 23, 577, True, d, intermediate)


def molmoe() -> Shapes:
    text, d, rows = "model.transformer.", 2048, 50304
    shapes: Shapes = {f"{text}wte.embedding": (rows, d), f"{text}wte.new_embedding": (128, d), f"{text}ln_f.weight": (d,)}
    shapes["lm_head.weight"] = (rows, d)
    for i in range(16):
        block = f"{text}blocks.{i}."
        shapes |= {f"{block}attn.att_proj.weight": (3 * d, d), f"{block}attn.attn_out.weight": (d, d)}
        shapes |= {f"{block}{norm}.weight": (d,) for norm in ("attn.q_norm", "attn.k_norm", "attn.attn_norm", "mlp.ff_norm")}
        shapes[f"{block}mlp.gate.weight"] = (64, d)
        for j in range(64):
            shapes |= {f"{block}mlp.experts.{j}.{name}.weight": (1024, d) for name in ("gate_proj", "up_proj")}
            shapes[f"{block}mlp.experts.{j}.down_proj.weight"] = (d, 1024)
    return shapes | vision("model.vision_backbone.", 1024, 4096, 23, 577, True, d, 1024)


def molmo2(d: int, layers: int, q: int, kv: int, intermediate: int, rows: int, norms: tuple[int, int]) -> Shapes:
    text = "model.transformer."
    shapes: Shapes = {f"{text}wte.embedding": (rows, d), f"{text}wte.new_embedding": (128, d), f"{text}ln_f.weight": (d,)}
    shapes["lm_head.weight"] = (rows, d)
    for i in range(layers):
        block = f"{text}blocks.{i}."
        shapes |= {f"{block}self_attn.att_proj.weight": (q + 2 * kv, d), f"{block}self_attn.attn_out.weight": (d, q)}
        shapes |= {f"{block}self_attn.q_norm.weight": (norms[0],), f"{block}self_attn.k_norm.weight": (norms[1],)}
        shapes |= {f"{block}mlp.ff_proj.weight": (2 * intermediate, d), f"{block}mlp.ff_out.weight": (d, intermediate)}
        shapes |= {f"{block}{norm}.weight": (d,) for norm in ("attn_norm", "ff_norm")}
    return shapes | vision("model.vision_backbone.", 1152, 4304, 25, 729, False, d, intermediate)


PUBLISHED = {
    "molmo-7b-d": dense(3584, 28, 3584, 512, 18944, 152064, True, False),
    "molmo-7b-o": dense(4096, 32, 4096, 4096, 11008, 100352, False, True),
    "molmo-72b": dense(8192, 80, 8192, 1024, 29568, 152064, True, False),
    "molmoe-1b": molmoe(),
    "molmo2-4b": molmo2(2560, 36, 4096, 1024, 9728, 151936, (128, 128)),
    "molmo2-8b": molmo2(4096, 36, 4096, 1024, 12288, 151936, (128, 128)),
    "molmo2-o-7b": molmo2(4096, 32, 4096, 4096, 11008, 100278, (4096, 4096)),
}


def on_meta(config: BaseModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return model_tensors(config.build_model())


def stored(config: BaseModelConfig) -> Shapes:
    tensors = on_meta(config)
    links = published_links(published_layout_of(config), tensors, config.llm)
    assert {link.native for link in links} == set(tensors), "every tensor of the model has a place"
    return {name: spec.shape for name, spec in export_specs(tensors, links).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name):
    shapes = stored(BaseModelConfig.load(CONFIGS / f"{name}.yaml"))
    assert shapes == PUBLISHED[name]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == TOTALS[name]


@pytest.fixture(scope="module")
def any_tokenizer(golden) -> Tokenizer:
    return Tokenizer.load(golden / "tokenizer")


@pytest.mark.parametrize("name", PUBLISHED)
def test_exported_settings_describe_the_same_model(name, any_tokenizer, tmp_path):
    config = BaseModelConfig.load(CONFIGS / f"{name}.yaml")
    write_published_files(tmp_path, config, published_layout_of(config), any_tokenizer, "bfloat16")
    data = read_published_config(Published.read(tmp_path))
    again = config_class(data["model_name"]).from_dict(data)
    assert stored(again) == PUBLISHED[name]
    assert again.llm.head_width == config.llm.head_width
    names = ["n_heads", "kv_heads", "rope_theta", "rope_type", "rope_factor", "rope_scaling_layers", "layer_norm_eps", "norm_after",
             "attention_layer_norm", "rope_attention_factor", "rope_beta_fast", "rope_original_max_position_embeddings",
             "embedding_rows", "moe_top_k"]  # fmt: skip
    for key in names:
        assert getattr(again.llm, key) == getattr(config.llm, key), key
    assert again.vision_backbone.vit.image_default_input_size == config.vision_backbone.vit.image_default_input_size
    assert again.bi_directional_attn == config.bi_directional_attn
    for key in ("max_crops", "overlap_margins", "legacy_image_mask", "use_single_crop_col_tokens", "pooling_h"):
        assert getattr(again.mm_preprocessor, key) == getattr(config.mm_preprocessor, key), key
    for key in ("message_format", "system_prompt", "prompt_templates", "always_start_with_space"):
        assert getattr(again.data_formatter, key) == getattr(config.data_formatter, key), key


@pytest.mark.parametrize("name", ["molmo2-4b", "molmo2-8b", "molmo2-o-7b"])
def test_transformers_builds_the_same_tensors_from_the_exported_settings(name, any_tokenizer, tmp_path):
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    config = BaseModelConfig.load(CONFIGS / f"{name}.yaml", ["llm.n_layers=2"])  # transformers is slow to build them all
    write_published_files(tmp_path, config, "molmo2", any_tokenizer, "bfloat16")
    with torch.device("meta"):
        theirs = Molmo2ForConditionalGeneration(Molmo2Config.from_pretrained(tmp_path))
    tensors = on_meta(config)
    specs = export_specs(tensors, published_links("molmo2_modules", tensors, config.llm))
    assert {k: s.shape for k, s in specs.items()} == {k: tuple(t.shape) for k, t in theirs.state_dict().items()}


RELEASED_7B_D = {
    "model_type": "molmo", "architectures": ["MolmoForCausalLM"], "attention_layer_norm": False, "clip_qkv": None, "embedding_size": 152064,
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 37888, "layer_norm_eps": 1e-06, "layer_norm_type": "rms",
    "max_position_embeddings": 4096, "norm_after": False, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "qkv_bias": True, "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_cache": True, "use_position_ids": True,
    "vocab_size": 152064, "weight_tying": False, "torch_dtype": "float32", "transformers_version": "4.43.3",
}  # fmt: skip
RELEASED_4B = {
    "model_type": "molmo2", "tie_word_embeddings": False, "image_start_token_id": 151936, "image_end_token_id": 151937,
    "image_patch_id": 151938, "image_col_id": 151939, "low_res_image_start_token_id": 151940, "image_low_res_id": 151942,
    "frame_start_token_id": 151943, "frame_end_token_id": 151944, "use_frame_special_tokens": True,
    "text_config": {
        "hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "additional_vocab_size": 128, "qkv_bias": False, "num_hidden_layers": 36, "intermediate_size": 9728, "hidden_act": "silu",
        "max_position_embeddings": 36864, "rope_theta": 5000000, "rope_scaling": None, "rope_scaling_layers": None, "use_qk_norm": True,
        "qk_norm_type": "qwen3", "layer_norm_eps": 1e-6, "norm_after": False,
    },
    "vit_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "head_dim": 72, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "image_default_input_size": [378, 378],
        "image_patch_size": 14, "image_num_pos": 729, "float32_attention": True,
    },
    "adapter_config": {
        "vit_layers": [-3, -9], "pooling_attention_mask": True, "hidden_size": 1152, "num_attention_heads": 16, "head_dim": 72,
        "intermediate_size": 9728, "text_hidden_size": 2560,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "released"), [("molmo-7b-d", RELEASED_7B_D), ("molmo2-4b", RELEASED_4B)])
def test_released_settings_are_understood(name, released, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released))
    data = read_published_config(Published.read(tmp_path))
    config = config_class(data["model_name"]).from_dict(data)
    assert stored(config) == PUBLISHED[name]
    assert config.llm.tokenizer.identifier == str(tmp_path)
    if name == "molmo-7b-d":
        assert config.mm_preprocessor.legacy_image_mask
        assert config.data_formatter.always_start_with_space
        assert [layer % 23 for layer in config.vision_backbone.vit_layers] == [21, 14]
    else:
        assert config.llm.rope_theta == 5e6
        assert not config.llm.weight_tying, "the published file holds its own output head"
        assert config.bi_directional_attn == "image_tokens"
        assert not config.mm_preprocessor.use_single_crop_col_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type 'llava'"),
        ({"alibi": True}, "alibi=True is not implemented"),
        ({"rope_impl": "cockatoo"}, "rope_impl='cockatoo' is not implemented"),
        ({"fix_pad_tokenizer": False}, "llm.fix_pad_tokenizer=False is not implemented; only True"),
    ],
)
def test_settings_that_do_not_exist_here_are_refused(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_7B_D | change))
    with pytest.raises(ValueError, match=re.escape(message)):
        config_class("molmo").from_dict(read_published_config(Published.read(tmp_path)))


def test_molmo2_with_tokens_elsewhere_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_4B | {"image_patch_id": 5}))
    with pytest.raises(ValueError, match=r"image_patch_id=5, expected vocab_size \+ 2 = 151938"):
        read_published_config(Published.read(tmp_path))


def test_the_export_spells_settings_as_the_release(any_tokenizer, tmp_path):
    config = BaseModelConfig.load(CONFIGS / "molmo2-4b.yaml")
    write_published_files(tmp_path, config, "molmo2", any_tokenizer, "bfloat16")
    exported = json.loads((tmp_path / "config.json").read_text())
    for key, value in RELEASED_4B.items():
        if isinstance(value, dict):
            differing = {k: (v, exported[key].get(k)) for k, v in value.items() if exported[key].get(k) != v}
            assert not differing, key
        else:
            assert exported[key] == value, key
