"""Initialising a new model from a text checkpoint (Qwen2, Qwen3, OLMo 2/3, OLMoE, Llama) and a vision one (CLIP, SigLIP, DINOv2)."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from molmo_core.checkpoint.folder import CheckpointError, local_folder, read_json
from molmo_core.checkpoint.layouts import transformers_block_links
from molmo_core.checkpoint.links import Link, Model, load_tensors, model_tensors
from molmo_core.checkpoint.published_config import rope_settings
from molmo_core.checkpoint.safetensors_stream import SafetensorsReader
from molmo_core.nn.configs import LlmConfig, VitConfig

_VIT = "vision_backbone.image_vit."
_OF_SPECIAL_TOKENS = ("transformer.wte.new_embedding", "transformer.ff_out.new_weight")


@dataclasses.dataclass(frozen=True)
class _TextFamily:
    """What a `model_type` implies beyond its config.json."""

    qk_norm: str | None = None
    norm_after: bool = False
    qkv_bias: bool = False
    moe: bool = False


_FAMILIES = {
    "qwen2": _TextFamily(qkv_bias=True),
    "qwen3": _TextFamily(qk_norm="qwen3"),
    "olmo2": _TextFamily(qk_norm="olmo", norm_after=True),
    "olmo3": _TextFamily(qk_norm="olmo", norm_after=True),
    "olmoe": _TextFamily(qk_norm="olmo", moe=True),
    "llama": _TextFamily(),
}


def initialise_backbones(model: Model) -> list[str]:
    """Loads what the configuration names: `llm.init_path` into the language model, `vit.init_path` into the vision encoder.

    The model may be sharded (FSDP2). Everything else (connector, special tokens) keeps its values.

    Returns:
        What was loaded, one line each.
    """
    done = []
    if model.config.llm.init_path:
        load_llm(model, model.config.llm.init_path)
        done.append(f"language model from {model.config.llm.init_path}")
    vision = getattr(model.config, "vision_backbone", None)
    if vision is not None and vision.vit.init_path:
        load_vit(model, vision.vit.init_path)
        done.append(f"vision encoder from {vision.vit.init_path}")
    return done


def load_llm(model: Model, path: str | Path) -> None:
    """Loads a text checkpoint in the layout of transformers (folder or hub repository) into the language model.

    Raises:
        CheckpointError: an unknown architecture, one that differs from `model.config.llm`, or tensors that do not fit.
    """
    folder, config = _open(path)
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise CheckpointError(f"{folder}: model_type {kind!r} is not a text model known here ({', '.join(_FAMILIES)})")
    llm = model.config.llm
    try:
        _compare_settings(folder, llm, _FAMILIES[kind], config)
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json: no key {error}, which a {kind} checkpoint has; copy or download it again") from error
    reader = SafetensorsReader(folder)
    prefix = "model." if "model.embed_tokens.weight" in reader.specs else ""
    names = [n for n in model_tensors(model) if n.startswith("transformer.") and n not in _OF_SPECIAL_TOKENS]
    head = "lm_head.weight" if "lm_head.weight" in reader.specs else f"{prefix}embed_tokens.weight"
    links = [link for name in names for link in _text_links(name, prefix, head, llm)]
    _load(model, reader, links, names, dropped=(r"lm_head\.weight" if llm.weight_tying else r"", r".*rotary_emb\.inv_freq"))


def load_vit(model: Model, path: str | Path) -> None:
    """Loads a vision checkpoint in the layout of transformers into the vision encoder; blocks above the last built one are left out.

    A positional table of another grid is interpolated (bicubic, as transformers does).

    Raises:
        CheckpointError: not the encoder that `vision_backbone.vit` describes, or tensors that do not fit.
    """
    folder, config = _open(path)
    config = config.get("vision_config", config) if "hidden_size" not in config else config
    vit = model.config.vision_backbone.vit
    reader = SafetensorsReader(folder)
    names = [n for n in model_tensors(model) if n.startswith(_VIT)]
    rule = _dino_links if vit.image_model_type == "dino" else _clip_links
    anchor = "embeddings.cls_token" if vit.image_model_type == "dino" else "embeddings.patch_embedding.weight"
    found = [n.removesuffix(anchor) for n in reader.specs if n.endswith(anchor)]
    if len(found) != 1:
        raise CheckpointError(f"{folder}: no {vit.image_model_type} encoder there (no tensor ...{anchor})")
    for theirs, ours in {"num_attention_heads": "image_num_heads", "hidden_act": "image_mlp_activations"}.items():
        if config.get(theirs, getattr(vit, ours)) != getattr(vit, ours):
            raise CheckpointError(f"{folder}: {theirs}={config[theirs]!r}, the configuration has vit.{ours}={getattr(vit, ours)!r}")
    links = [link for name in names for link in rule(name, found[0], vit)]
    outside = rf"(?!{re.escape(found[0])}).*" if found[0] else r"(text_model|text_projection|visual_projection|logit_).*"
    unused = r"(post_layernorm|layernorm|head|encoder\.layers?\.\d+)\..*|embeddings\.(mask_token|position_ids)"
    _load(model, reader, links, names, dropped=(outside, rf"{re.escape(found[0])}({unused})"))


def _load(model: Model, reader: SafetensorsReader, links: list[Link], names: Iterable[str], dropped: Iterable[str]) -> None:
    report = load_tensors(model, reader, links, strict=False)
    missing = sorted(set(names) & set(report.missing))
    unexpected = [n for n in report.unexpected if not any(p and re.fullmatch(p, n) for p in dropped)]
    if missing or unexpected:
        lines = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]
        raise CheckpointError(f"{reader.path}: {len(lines)} tensor(s) do not fit the model\n  " + "\n  ".join(lines))


def _text_links(name: str, prefix: str, head: str, llm: LlmConfig) -> list[Link]:
    whole = {
        "transformer.wte.embedding": f"{prefix}embed_tokens.weight",
        "transformer.ln_f.weight": f"{prefix}norm.weight",
        "transformer.ff_out.weight": head,
    }
    if name in whole:
        return [Link(name, whole[name])]
    _, _, number, rest = name.split(".", 3)
    layer = f"{prefix}layers.{number}."
    if rest.startswith("ffn.experts.mlp."):
        kind = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}[rest.removeprefix("ffn.experts.mlp.")]
        size = llm.intermediate_size
        return [
            Link(name, f"{layer}mlp.experts.{e}.{kind}.weight", (e * size, (e + 1) * size), transposed=kind == "down_proj")
            for e in range(llm.moe_num_experts)
        ]
    before = ("input_layernorm", "post_attention_layernorm")
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    norms = after if llm.norm_after else before
    stems = {
        "attn_out": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "ff_out": "mlp.down_proj",
        "attn_norm": norms[0], "ff_norm": norms[1], "ffn.router.layer": "mlp.gate", "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "ff_proj1": "mlp.gate_proj", "ff_proj2": "mlp.up_proj",
    }  # fmt: skip
    return transformers_block_links(name, layer, rest, llm, stems)


def _clip_links(name: str, prefix: str, vit: VitConfig) -> list[Link]:
    """CLIP and SigLIP share their names."""
    rest = name.removeprefix(_VIT)
    if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", rest):
        modules = {
            "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
            "attention.wo": "self_attn.out_proj", "feed_forward.w1": "mlp.fc1", "feed_forward.w2": "mlp.fc2",
            "attention_norm": "layer_norm1", "ffn_norm": "layer_norm2",
        }  # fmt: skip
        return [Link(name, f"{prefix}encoder.layers.{match[1]}.{modules[match[2]]}.{match[3]}")]
    if rest == "positional_embedding":
        return [Link(name, f"{prefix}embeddings.position_embedding.weight", convert=lambda t: _positions(t, vit))]
    if rest == "patch_embedding.weight":
        return [Link(name, f"{prefix}embeddings.patch_embedding.weight", convert=_patches)]
    other = {"class_embedding": "embeddings.class_embedding", "patch_embedding.bias": "embeddings.patch_embedding.bias"}
    return [Link(name, prefix + other.get(rest, rest.replace("pre_ln", "pre_layrnorm")))]  # spelt so in CLIP


def _dino_links(name: str, prefix: str, vit: VitConfig) -> list[Link]:
    rest = name.removeprefix(_VIT)
    if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", rest):
        modules = {
            "attention.wq": "attention.attention.query", "attention.wk": "attention.attention.key",
            "attention.wv": "attention.attention.value", "attention.wo": "attention.output.dense", "feed_forward.w1": "mlp.fc1",
            "feed_forward.w2": "mlp.fc2", "attention_norm": "norm1", "ffn_norm": "norm2",
        }  # fmt: skip
        scales = {"lambda1": "layer_scale1.lambda1", "lambda2": "layer_scale2.lambda1"}
        stem, _, kind = match[2].rpartition(".")
        there = scales[match[2]] if match[2] in scales else f"{modules[stem]}.{kind}"
        return [Link(name, f"{prefix}encoder.layer.{match[1]}.{there}")]
    if rest == "positional_embedding":
        return [Link(name, f"{prefix}embeddings.position_embeddings", convert=lambda t: _positions(t.squeeze(0), vit))]
    if rest == "class_embedding":
        return [Link(name, f"{prefix}embeddings.cls_token", convert=torch.flatten)]
    if rest == "patch_embedding.weight":
        return [Link(name, f"{prefix}embeddings.patch_embeddings.projection.weight", convert=_patches)]
    return [Link(name, f"{prefix}embeddings.patch_embeddings.projection.bias")]


def _patches(weight: torch.Tensor) -> torch.Tensor:
    """Convolution [D, 3, p, p] -> linear [D, p·p·3], (row, col, channel) inside a patch."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _positions(table: torch.Tensor, vit: VitConfig) -> torch.Tensor:
    """[(1 +) n·n, D] -> the grid of the configuration; the row of the class token stays."""
    special = int(vit.has_class_token)
    if len(table) == vit.image_num_pos:
        return table
    side = round((len(table) - special) ** 0.5)
    if side * side != len(table) - special:
        raise CheckpointError(f"positional table of {len(table)} rows is not a square grid with {special} class token(s)")
    image = table[special:].float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=vit.grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:special].float(), image[0].flatten(1).T])


def _compare_settings(folder: Path, llm: LlmConfig, family: _TextFamily, config: dict[str, Any]) -> None:
    """Shapes do not show everything (number of heads, norms, rotary base): compare the settings, too."""
    heads = config["num_attention_heads"]
    structure = {
        "llm.d_model": (llm.d_model, config["hidden_size"]),
        "llm.n_layers": (llm.n_layers, config["num_hidden_layers"]),
        "llm.n_heads": (llm.n_heads, heads),
        "llm.n_kv_heads": (llm.kv_heads, config.get("num_key_value_heads") or heads),
        "llm.head_dim": (llm.head_width, config.get("head_dim") or config["hidden_size"] // heads),
        "llm.mlp_hidden_size / 2": (llm.intermediate_size, config["intermediate_size"]),
        "llm.embedding_size": (llm.embedding_rows, config["vocab_size"]),
        "llm.norm_after": (llm.norm_after, family.norm_after),
        "llm.qkv_bias": (llm.qkv_bias, bool(config.get("attention_bias", False)) or family.qkv_bias),
        "llm.attention_layer_norm_type": (llm.attention_layer_norm_type if llm.attention_layer_norm else None, family.qk_norm),
        "llm.block_type is moe": (llm.block_type == "moe", family.moe),
        "llm.clip_qkv": (llm.clip_qkv, config.get("clip_qkv")),
        "activation": ("silu", config.get("hidden_act", "silu")),
    }
    if family.moe:
        structure["llm.moe_num_experts"] = (llm.moe_num_experts, config["num_experts"])
        structure["llm.moe_top_k"] = (llm.moe_top_k, config["num_experts_per_tok"])
        structure["renormalised weights of experts"] = (False, bool(config.get("norm_topk_prob", False)))
    if llm.weight_tying:
        structure["llm.weight_tying"] = (True, bool(config.get("tie_word_embeddings", False)))
    wrong = [f"{key}={ours!r}, the checkpoint has {theirs!r}" for key, (ours, theirs) in structure.items() if ours != theirs]
    if wrong:
        raise CheckpointError(f"{folder}: another architecture than the configuration's\n  " + "\n  ".join(wrong))
    rope = rope_settings(config, folder / "config.json")
    numbers = {"layer_norm_eps": config.get("rms_norm_eps"), "rope_theta": rope["rope_theta"], "rope_type": rope["rope_type"]}
    for key, theirs in numbers.items():
        if theirs is not None and getattr(llm, key) != theirs:
            warnings.warn(f"{folder}: trained with {key}={theirs}, the configuration says llm.{key}={getattr(llm, key)}", stacklevel=3)


def _open(path: str | Path) -> tuple[Path, dict[str, Any]]:
    folder = local_folder(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a backbone is a folder that transformers' save_pretrained wrote")
    return folder, read_json(folder / "config.json")
