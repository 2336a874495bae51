"""The settings of published config.json files: their names, which values exist here, and the check that none is ignored in silence."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from molmo_core.checkpoint.folder import CheckpointError
from molmo_core.nn.configs import NORMALISATION, LlmConfig, VitConfig
from molmo_core.tokens import SPECIAL_TOKENS

# Names of the 0924 dense config.json -> names of `LlmConfig`. MolmoE's config.json has the latter already.
DENSE_LLM = {
    "hidden_size": "d_model", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size", "max_position_embeddings": "max_sequence_length",
}  # fmt: skip
# Names of Molmo2's text_config, vision_config -> ours: as released and, after those, as transformers writes them.
MOLMO2_LLM = {
    "hidden_size": "d_model", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim",
    "num_hidden_layers": "n_layers", "vocab_size": "vocab_size", "additional_vocab_size": "additional_vocab_size",
    "qkv_bias": "qkv_bias", "attention_bias": "qkv_bias", "use_qk_norm": "attention_layer_norm", "norm_after": "norm_after",
    "qk_norm_type": "attention_layer_norm_type", "layer_norm_eps": "layer_norm_eps", "rms_norm_eps": "layer_norm_eps",
    "max_position_embeddings": "max_position_embeddings", "initializer_range": "initializer_range",
    "embedding_dropout": "embedding_dropout", "attention_dropout": "attention_dropout", "residual_dropout": "residual_dropout",
}  # fmt: skip
MOLMO2_VIT = {
    "hidden_size": "image_emb_dim", "intermediate_size": "image_mlp_dim", "num_hidden_layers": "image_num_layers",
    "num_attention_heads": "image_num_heads", "num_key_value_heads": "image_num_key_value_heads", "head_dim": "image_head_dim",
    "hidden_act": "image_mlp_activations", "layer_norm_eps": "image_norm_eps", "initializer_range": "initializer_range",
    "image_default_input_size": "image_default_input_size", "image_size": "image_default_input_size",
    "image_patch_size": "image_patch_size", "patch_size": "image_patch_size",
    "image_num_pos": "image_num_pos", "num_position_embeddings": "image_num_pos",
    "attention_dropout": "attention_dropout", "residual_dropout": "residual_dropout",
}  # fmt: skip
ROPE = {
    "factor": "rope_factor", "attention_factor": "rope_attention_factor", "beta_fast": "rope_beta_fast", "beta_slow": "rope_beta_slow",
    "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}  # fmt: skip
# Ids of config.json -> index of the token after the vocabulary (published Molmo2 tokenizers).
MOLMO2_TOKENS = {name: SPECIAL_TOKENS["molmo2"].index(token) for name, token in {
    "image_start_token_id": "<im_start>", "image_end_token_id": "<im_end>", "image_patch_id": "<im_patch>", "image_col_id": "<im_col>",
    "low_res_image_start_token_id": "<low_res_im_start>", "image_low_res_id": "<im_low>", "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}.items()}  # fmt: skip

# Other settings of Molmo2's config.json that are read, or follow from what is read. Part "" is the file itself.
_MOLMO2_READ: dict[str, tuple[str, ...]] = {
    "": (*MOLMO2_TOKENS, "text_config", "vit_config", "vision_config", "adapter_config", "use_frame_special_tokens", "image_high_res_id",
         "image_token_id", "video_token_id", "bi_directional_attn"),
    "text_config": ("intermediate_size", "rope_theta", "rope_scaling", "rope_parameters", "rope_scaling_layers"),
    "vision_config": ("float32_attention",),
    "adapter_config": ("vit_layers", "vision_feature_layer", "pooling_attention_mask", "image_feature_dropout", "float32_attention",
                       "hidden_size", "text_hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
}  # fmt: skip
# Settings of Molmo2 that exist here with these values only.
_MOLMO2_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"tie_word_embeddings": (False,)},
    "text_config": {"hidden_act": ("silu",), "tie_word_embeddings": (False,), "use_sliding_window": (False,)},
    "vision_config": {"attention_bias": (True,), "num_channels": (3,)},
    "adapter_config": {
        "hidden_act": ("silu",), "attention_bias": (True,), "mlp_bias": (False,), "attention_dropout": (0.0,), "residual_dropout": (0.0,),
    },
}  # fmt: skip
_MOLMO2_NAMES = {"": {}, "text_config": MOLMO2_LLM, "vision_config": MOLMO2_VIT, "adapter_config": {}}
# Settings of MolmoPoint beside those of Molmo2: names that are the same here, ids of tokens, and the others that are read.
POINT_SETTINGS = (
    "patch_location", "no_more_points_class", "patch_embed_dim", "patch_embedding_kind", "embed_selected_vit_patch", "embed_location",
    "layer_norm_x", "norm_logits", "mask_patches", "mask_subpatches", "mask_repeats", "token_prediction_rotary",
    "token_prediction_rotary_theta",
)  # fmt: skip
POINT_TOKEN_NAMES = {name: SPECIAL_TOKENS["molmo2"].index(token) for name, token in {
    "patch_token_id": "<|token_index|>", "subpatch_token_id": "<|vit_index|>", "location_token_id": "<|vit_loc|>",
    "image_non_indexable_patch_id": "<im_low>", "image_high_res_id": "<im_patch>",
}.items()}  # fmt: skip
_POINT_READ = {"": (*POINT_SETTINGS, *POINT_TOKEN_NAMES), "adapter_config": ("attention_pooling_out_layer", "positional_embeddings")}
# What every Molmo2 has (the released spelling: more), and what would compute another model if it were guessed.
_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "intermediate_size")
_MOLMO2_SIZES = {"text_config": (*_SIZES, "vocab_size"), "vision_config": _SIZES, "adapter_config": ()}
_MOLMO2_REQUIRED = {"text_config": ("qk_norm_type",), "vision_config": (), "adapter_config": ()}
_RELEASED_REQUIRED = {
    "text_config": ("use_qk_norm", "qkv_bias", "rope_theta"),
    "vision_config": (),
    "adapter_config": ("vit_layers", "pooling_attention_mask"),
}
_ROPE_FIXED: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0,), "truncate": (True,)}
_PIXELS_FIXED: dict[str, tuple[Any, ...]] = {
    "do_convert_rgb": (True,), "do_normalize": (True,), "do_rescale": (True,), "do_resize": (True,), "resample": (2,),
    "rescale_factor": (1 / 255,), "video_use_col_tokens": (False,),
}  # fmt: skip

# Features of the first training code that no released checkpoint uses: these values only.
_LEGACY_FIXED: dict[str, tuple[Any, ...]] = {
    "alibi": (False,), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "use_cls_feature": (False,),
    "multi_query_attention": (None, False), "response_attention_dropout": (0, 0.0), "image_pooling_h": (2,), "image_pooling_w": (2,),
    "crop_mode": ("overlap-and-resize-c2", "resize"), "unconditioned": (False,), "do_random_scale": (False,), "prompt_override": (None,),
}  # fmt: skip
_LEGACY_READ = (
    "vision_backbone", "image_pooling_2d", "image_projector", "image_padding_embed", "vit_layers", "image_feature_dropout", "prompt_type",
    "message_formatting", "system_prompt_kind", "always_start_with_space", "default_inference_len", "max_crops", "overlap_margins",
    "use_col_tokens", "loss_token_weighting", "legacy_image_mask",
)  # fmt: skip
# How that code ran, or parts of features that are off.
_LEGACY_IDLE = (
    "alibi_bias_max", "block_group_size", "fix_image_input_idx", "gin_bindings", "init_device", "llm_load_path", "low_cpu_fsdp", "pad_to",
    "pad_tokenizer", "precision", "query_pre_attn_scalar", "vit_load_path", "tie_word_embeddings",
)  # fmt: skip
# Weights that are stored in another form than the model computes with.
_NOWHERE: dict[str, tuple[Any, ...]] = {"quantization_config": (None,)}
# What transformers keeps in any config.json and no model computes with.
_BOOKKEEPING = frozenset({
    "architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
})  # fmt: skip


def check_molmo2(data: dict[str, Any], source: Path, points: bool = False) -> None:
    """Whether everything that a Molmo2 config.json says is known here.

    Args:
        data: its content; encoder settings under `vit_config` (released) or `vision_config` (transformers).
        source: the file.
        points: it is MolmoPoint's.

    Raises:
        CheckpointError: a setting is missing, or it is not implemented.
    """
    more: dict[str, tuple[str, ...]] = _POINT_READ if points else {}
    released = "vision_config" not in data
    check_settings(data, {*_MOLMO2_READ[""], *more.get("", ())}, _MOLMO2_FIXED[""], source)
    for part in ("text_config", "vision_config", "adapter_config"):
        name = "vit_config" if released and part == "vision_config" else part
        if not isinstance(data.get(name), dict):
            raise CheckpointError(f"{source}: no key {name!r}, which a Molmo2 checkpoint has; copy or download it again")
        section = data[name]
        required = _MOLMO2_SIZES[part] + _MOLMO2_REQUIRED[part] + (_RELEASED_REQUIRED[part] if released else ())
        if missing := [f"{name}.{key}" for key in required if key not in section]:
            raise CheckpointError(f"{source}: no key {', '.join(missing)}, which a Molmo2 checkpoint has; copy or download it again")
        if odd := [f"{name}.{key}={section[key]!r}" for key in _MOLMO2_SIZES[part] if type(section[key]) is not int]:
            raise CheckpointError(f"{source}: {', '.join(odd)} must be a whole number")
        known = {*_MOLMO2_READ[part], *_MOLMO2_NAMES[part], *more.get(part, ())}
        check_settings(section, known, _MOLMO2_FIXED[part], source, f"{name}.")


def check_legacy(data: dict[str, Any], source: Path) -> None:
    """As `check_molmo2`, for config.json of the 0924 releases."""
    known = {f.name for f in dataclasses.fields(LlmConfig)} | {*LlmConfig.FIXED, *DENSE_LLM, *_LEGACY_READ, *_LEGACY_IDLE}
    check_settings(data, known, _LEGACY_FIXED, source)


def check_rope(data: dict[str, Any], source: object) -> None:
    """As `check_molmo2`, for rotary settings in any spelling."""
    check_settings(data, {*ROPE, "rope_type", "type", "rope_theta"}, _ROPE_FIXED, source, "rope_parameters.")


def check_pixels(data: dict[str, Any], vit: VitConfig, source: object) -> None:
    """Whether a processor file makes the pixels that are made here: sizes and normalisation are settings of the encoder.

    Raises:
        CheckpointError: it makes others.
    """
    mean, std = (list(values) for values in NORMALISATION[vit.normalize])
    size = list(vit.image_default_input_size)
    fixed: dict[str, tuple[Any, ...]] = {
        "image_mean": (mean,), "image_std": (std,), "patch_size": (vit.image_patch_size,), "image_patch_size": (vit.image_patch_size,),
        "base_image_input_size": (size,), "size": (dict(zip(("height", "width"), size)),),
    }  # fmt: skip
    given = {key: value for key, value in data.items() if key in fixed or key in _PIXELS_FIXED}
    if isinstance(given.get("size"), dict):
        given["size"] = {key: value for key, value in given["size"].items() if value is not None}
    check_settings(given, (), fixed | _PIXELS_FIXED, source)


def check_settings(
    data: dict[str, Any], known: Iterable[str], fixed: Mapping[str, tuple[Any, ...]], source: object, prefix: str = ""
) -> None:
    """Whether a part of a config.json asks for nothing that does not exist here. What is unset, off or bookkeeping may stand there.

    A name that nobody here knows may be a note of the tool that wrote the file or part of another model: it gives one warning.

    Args:
        data: names and values.
        known: names that are read.
        fixed: names with the values that exist.
        source: the file, for errors; `prefix` is where in the file the part stands.

    Raises:
        CheckpointError: settings that are not implemented, all of them.
    """
    known, fixed = set(known) | _BOOKKEEPING, {**_NOWHERE, **fixed}
    wrong = [key for key, value in data.items() if key in fixed and value is not None and value not in fixed[key]]
    if wrong:
        lines = (f"{prefix}{key}={data[key]!r} is not implemented; only {fixed[key][0]!r}" for key in wrong)
        raise CheckpointError(f"{source}: " + "\n  ".join(lines))
    strange = [
        f"{prefix}{key}={value!r}"
        for key, value in data.items()
        if not (key in known or key in fixed or key.startswith("_") or value in (None, False, 0, "", [], {}))
    ]
    if strange:
        warnings.warn(
            f"{source}: not known here and ignored: {', '.join(strange)}. If the model computes with it, its results will differ.",
            stacklevel=2,
        )
