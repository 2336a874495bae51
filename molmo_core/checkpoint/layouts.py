"""The published tensor layouts as tables of links: Molmo (dense), MolmoE, Molmo2 (also as a transformers module names it), MolmoPoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from molmo_core.checkpoint.folder import CheckpointError
from molmo_core.checkpoint.links import Link, Rows
from molmo_core.checkpoint.safetensors_stream import TensorSpec
from molmo_core.nn.configs import LlmConfig

Layout = Literal["molmo", "molmoe", "molmo2", "molmo2_modules", "molmo_point"]

_BLOCK = re.compile(r"transformer\.blocks\.(\d+)\.(.+)")
_EMBEDDING = "transformer.wte.embedding"
_NEW_EMBEDDING = "transformer.wte.new_embedding"
_HEAD = "transformer.ff_out.weight"
_LM_HEAD = "lm_head.weight"


def published_links(layout: Layout, names: Iterable[str], llm: LlmConfig, stored: Mapping[str, TensorSpec] | None = None) -> list[Link]:
    """The table between a model and a published layout.

    Args:
        layout: `molmo` and `molmoe`: the 0924 releases; `molmo2`: the Molmo2 releases (what transformers saves, too);
            `molmo2_modules`: the names of transformers' Molmo2 modules; `molmo_point`: the MolmoPoint releases.
        names: the model's tensor names.
        llm: sizes of the language model.
        stored: tensors of the file to be read. transformers cuts the two embedding tables of Molmo2 elsewhere than the
            releases do; this tells where. None = the table for writing.
    """
    link = _RULES[layout]
    links = [found for name in names for found in link(name, llm)]
    if layout == "molmo2":
        links = [found for found in links if found.native not in (_EMBEDDING, _NEW_EMBEDDING)] + _joined_embedding(llm, stored)
    if layout.startswith("molmo2") and llm.weight_tying:
        links.append(Link(_EMBEDDING, _LM_HEAD, export_only=True))
    if layout == "molmo_point" and llm.weight_tying:
        links += [Link(_EMBEDDING, _POINT_HEAD, export_only=True), Link(_NEW_EMBEDDING, _NEW_POINT_HEAD, export_only=True)]
    return links


def detect_layout(model_type: str, stored: Iterable[str], source: object) -> Layout:
    """The layout of a published checkpoint, from `model_type` of its config.json and the names of its tensors."""
    names = set(stored)
    if model_type in ("molmo", "hf_molmo"):
        return "molmoe" if any(".mlp.experts." in name for name in names) else "molmo"
    if model_type == "molmo2":
        return "molmo2_modules" if any(name.startswith("model.language_model.") for name in names) else "molmo2"
    if model_type == "molmo_point":
        return "molmo_point"
    raise CheckpointError(f"{source}: model_type {model_type!r} is none of the published Molmo layouts (molmo, molmo2, molmo_point)")


def _molmo(name: str, llm: LlmConfig) -> list[Link]:
    return [Link(name, f"model.{name}")]


_MOLMOE_BLOCK = {
    "att_proj": "attn.att_proj", "attn_out": "attn.attn_out", "q_norm": "attn.q_norm", "k_norm": "attn.k_norm",
    "attn_norm": "attn.attn_norm", "ff_norm": "mlp.ff_norm", "ffn.router.layer": "mlp.gate",
}  # fmt: skip
_MOLMOE_EXPERT = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}


def _molmoe(name: str, llm: LlmConfig) -> list[Link]:
    """Experts lie side by side here and one by one there; the down projections are transposed here."""
    if name == _HEAD:
        return [Link(name, _LM_HEAD)]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return [Link(name, f"model.{name}")]
    block, rest = f"model.transformer.blocks.{match[1]}.", match[2]
    if rest.startswith("ffn.experts.mlp."):
        kind, rows = rest.removeprefix("ffn.experts.mlp."), llm.intermediate_size
        return [
            Link(name, f"{block}mlp.experts.{e}.{_MOLMOE_EXPERT[kind]}.weight", (e * rows, (e + 1) * rows), transposed=kind == "w2")
            for e in range(llm.moe_num_experts)
        ]
    stem, kind = rest.rsplit(".", 1)
    return [Link(name, f"{block}{_of(_MOLMOE_BLOCK, stem, name)}.{kind}")]


_MOLMO2_BLOCK = {
    "att_proj": "self_attn.att_proj", "attn_out": "self_attn.attn_out", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "ff_proj": "mlp.ff_proj", "ff_out": "mlp.ff_out", "attn_norm": "attn_norm", "ff_norm": "ff_norm",
}  # fmt: skip


def _molmo2(name: str, llm: LlmConfig) -> list[Link]:
    if name == _HEAD:
        return [Link(name, _LM_HEAD)]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return [Link(name, f"model.{name}")]
    stem, kind = match[2].rsplit(".", 1)
    return [Link(name, f"model.transformer.blocks.{match[1]}.{_of(_MOLMO2_BLOCK, stem, name)}.{kind}")]


_POINT_HEAD, _NEW_POINT_HEAD = "lm_head.output_embeddings", "lm_head.new_output_embeddings"
_POINT_NAMES = (
    ("transformer.ff_out.weight", _POINT_HEAD),
    ("transformer.ff_out.new_weight", _NEW_POINT_HEAD),
    ("vision_backbone.image_vit.", "model.vit."),
    ("vision_backbone.positional_embeddings", "model.connector.positional_embeddings.bias"),
    ("vision_backbone.", "model.connector."),
    ("point_embedding.", "model."),
)
"""Beginnings of names here and there; the others are those of Molmo2."""


def _molmo_point(name: str, llm: LlmConfig) -> list[Link]:
    for here, there in _POINT_NAMES:
        if name.startswith(here):
            return [Link(name, there + name.removeprefix(here))]
    return _molmo2(name, llm)


# transformers names the norms of both placements alike.
_MODULES_BLOCK = {
    "attn_out": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
}  # fmt: skip
_VIT, _RESBLOCK = r"vision_backbone\.image_vit\.", r"vision_backbone\.image_vit\.transformer\.resblocks\.(\d+)\."
_TOWER, _ADAPTER = "model.vision_tower.", "model.multi_modal_projector."
_MODULES_VISION = (
    (rf"{_RESBLOCK}attention\.w([qkvo])\.", rf"{_TOWER}layers.\1.self_attn.\2_proj."),
    (rf"{_RESBLOCK}feed_forward\.w([12])\.", rf"{_TOWER}layers.\1.mlp.fc\2."),
    (rf"{_RESBLOCK}attention_norm\.", rf"{_TOWER}layers.\1.layer_norm1."),
    (rf"{_RESBLOCK}ffn_norm\.", rf"{_TOWER}layers.\1.layer_norm2."),
    (_VIT, _TOWER),
    (r"vision_backbone\.image_pooling_2d\.w([qkvo])\.", rf"{_ADAPTER}image_pooling_2d.\1_proj."),
    (r"vision_backbone\.image_projector\.w1\.", f"{_ADAPTER}image_projector.gate_proj."),
    (r"vision_backbone\.image_projector\.w2\.", f"{_ADAPTER}image_projector.down_proj."),
    (r"vision_backbone\.image_projector\.w3\.", f"{_ADAPTER}image_projector.up_proj."),
)


def _molmo2_modules(name: str, llm: LlmConfig) -> list[Link]:
    rows = llm.embedding_rows
    table = "model.language_model.embed_tokens.weight"
    whole = {_HEAD: _LM_HEAD, "transformer.ln_f.weight": "model.language_model.norm.weight"}
    if name in whole:
        return [Link(name, whole[name])]
    if name == _EMBEDDING:
        return [Link(name, table, None, (0, rows))]
    if name == _NEW_EMBEDDING:
        return [Link(name, table, None, (rows, rows + llm.additional_vocab_size))]
    match = _BLOCK.fullmatch(name)
    if match is None:
        for pattern, replacement in _MODULES_VISION:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return [Link(name, renamed)]
        raise CheckpointError(f"tensor {name} has no place in the Molmo2 layout")
    return transformers_block_links(name, "model.language_model.layers." + match[1] + ".", match[2], llm, _MODULES_BLOCK)


def transformers_block_links(name: str, prefix: str, rest: str, llm: LlmConfig, stems: Mapping[str, str]) -> list[Link]:
    """Links of one block tensor to the separate projections of transformers' decoder layers.

    Args:
        name: the tensor here; `rest` is its name inside the block.
        prefix: of the layer there.
        stems: module names for everything but the fused projections.
    """
    stem, kind = rest.rsplit(".", 1)
    if stem == "att_proj":
        queries, keys = llm.n_heads * llm.head_width, llm.kv_heads * llm.head_width
        return _cut(name, {f"{prefix}self_attn.{p}_proj.{kind}": width for p, width in (("q", queries), ("k", keys), ("v", keys))})
    if stem == "ff_proj":
        return _cut(name, {f"{prefix}mlp.{p}_proj.{kind}": llm.intermediate_size for p in ("up", "gate")})
    return [Link(name, f"{prefix}{_of(stems, stem, name)}.{kind}")]


def _cut(name: str, widths: Mapping[str, int]) -> list[Link]:
    """A tensor here whose rows are several tensors there, in this order."""
    links, start = [], 0
    for other, width in widths.items():
        links.append(Link(name, other, (start, start + width)))
        start += width
    return links


def _joined_embedding(llm: LlmConfig, stored: Mapping[str, TensorSpec] | None) -> list[Link]:
    """Both embedding tables as one, cut here after the vocabulary and there wherever the file cuts it."""
    total = llm.embedding_rows + llm.additional_vocab_size
    there = {f"model.{_EMBEDDING}": llm.embedding_rows, f"model.{_NEW_EMBEDDING}": llm.additional_vocab_size}
    if stored is not None and all(name in stored for name in there) and sum(stored[n].shape[0] for n in there) == total:
        there = {name: stored[name].shape[0] for name in there}
    here = {_EMBEDDING: llm.embedding_rows, _NEW_EMBEDDING: llm.additional_vocab_size}
    links = []
    for native, (start, stop) in _spans(here).items():
        for other, (first, last) in _spans(there).items():
            low, high = max(start, first), min(stop, last)
            if low < high:
                links.append(Link(native, other, (low - start, high - start), (low - first, high - first)))
    return links


def _spans(sizes: Mapping[str, int]) -> dict[str, Rows]:
    spans, start = {}, 0
    for name, size in sizes.items():
        spans[name] = (start, start + size)
        start += size
    return spans


def _of(names: Mapping[str, str], stem: str, tensor: str) -> str:
    if stem not in names:
        raise CheckpointError(f"tensor {tensor} has no place in this layout")
    return names[stem]


_RULES: dict[Layout, Callable[[str, LlmConfig], list[Link]]] = {
    "molmo": _molmo,
    "molmoe": _molmoe,
    "molmo2": _molmo2,
    "molmo2_modules": _molmo2_modules,
    "molmo_point": _molmo_point,
}
