"""config.json and the processor files of published checkpoints -> our configuration (see `export_config` for the way back)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from molmo_core.checkpoint.folder import CheckpointError, Published, read_json
from molmo_core.checkpoint.published_settings import (
    DENSE_LLM,
    MOLMO2_LLM,
    MOLMO2_TOKENS,
    MOLMO2_VIT,
    POINT_SETTINGS,
    POINT_TOKEN_NAMES,
    ROPE,
    check_legacy,
    check_molmo2,
    check_pixels,
    check_rope,
    check_settings,
)
from molmo_core.nn.configs import LlmConfig, VitConfig

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files beside config.json that say how media become tokens."""


def read_published_config(checkpoint: Published) -> dict[str, Any]:
    """The configuration of a published checkpoint, as data for `config_class(data["model_name"]).from_dict`.

    Raises:
        CheckpointError: an unknown model, or a setting that does not exist here.
    """
    data, folder = checkpoint.content, checkpoint.folder
    kind = checkpoint.model_type
    if kind == "molmo2":
        check_molmo2(data, checkpoint.source)
        config = _molmo2(data, folder)
    elif kind == "molmo_point":
        check_molmo2(data, checkpoint.source, points=True)
        config = _molmo_point(data, folder)
    elif isinstance(data.get("llm"), dict):  # newer exports of the research code carry our structure
        parts = ("llm", "vision_backbone", "data_formatter", "mm_preprocessor", "bi_directional_attn")
        check_settings(data, parts, {"tie_word_embeddings": (False,)}, checkpoint.source)
        config = {k: data[k] for k in parts if k in data}
        config["model_name"] = "molmo"
    elif kind == "molmo":
        config = _molmo_0924(data, folder)
    else:
        raise CheckpointError(
            f"{checkpoint.source}: model_type {kind!r} is not a Molmo model (molmo, molmo2, molmo_point); "
            "a plain text or vision checkpoint initialises a new model through llm.init_path or vit.init_path"
        )
    config["llm"] = {**config["llm"], "tokenizer": {"identifier": str(folder.resolve())}}
    return config


def _molmo_0924(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Molmo and MolmoE of September 2024. Vision settings that the dense config.json leaves out are those of the release."""
    check_legacy(data, folder / "config.json")
    if "hidden_size" in data:
        data = {DENSE_LLM.get(key, key): value for key, value in data.items()}
    fields = {f.name for f in dataclasses.fields(LlmConfig)} | set(LlmConfig.FIXED)
    llm = {k: v for k, v in data.items() if k in fields and k not in ("tokenizer", "init_path")}
    vit = data.get("vision_backbone") or {}
    images = read_json(folder / "preprocessor_config.json", missing_ok=True)
    check_pixels(images, VitConfig.from_dict(vit, str(folder / "config.json")), folder / "preprocessor_config.json")

    def setting(name: str, default: Any) -> Any:
        value = images.get(name, data.get(name))
        return default if value is None else value

    return {
        "model_name": "molmo",
        "llm": llm,
        "vision_backbone": {
            "vit": vit,
            "image_pooling_2d": data.get("image_pooling_2d", "attention_meanq"),
            "image_projector": data.get("image_projector", "mlp"),
            "image_padding_embed": data.get("image_padding_embed", "pad_and_partial_pad"),
            "vit_layers": data.get("vit_layers", [-2, -9]),
            "skip_unused_layers": False,
            "image_feature_dropout": data.get("image_feature_dropout", 0.0),
        },
        "data_formatter": {
            "prompt_templates": data.get("prompt_type", "uber_model"),
            "message_format": data.get("message_formatting", "role"),
            "system_prompt": data.get("system_prompt_kind", "demo_or_style"),
            "always_start_with_space": data.get("always_start_with_space", True),
            "default_inference_len": data.get("default_inference_len", 65),
        },
        "mm_preprocessor": {
            "crop_mode": data.get("crop_mode", "overlap-and-resize-c2"),
            "max_crops": setting("max_crops", 12),
            "overlap_margins": setting("overlap_margins", (4, 4)),
            "use_col_tokens": setting("use_col_tokens", True),
            "loss_token_weighting": data.get("loss_token_weighting", "root_subsegments"),
            "legacy_image_mask": data.get("legacy_image_mask", True),
        },
        "bi_directional_attn": None,
    }


def _molmo_point(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """MolmoPoint: Molmo2 and the settings of its points."""
    config, rows, adapter = _molmo2(data, folder), data["text_config"]["vocab_size"], data["adapter_config"]
    for key, index in POINT_TOKEN_NAMES.items():
        if data.get(key) not in (None, rows + index):
            raise CheckpointError(f"{folder}/config.json: {key}={data[key]}, expected vocab_size + {index} = {rows + index}")
    config["vision_backbone"] |= {
        "pooling_out_layer": adapter.get("attention_pooling_out_layer", True),
        "positional_embeddings": adapter.get("positional_embeddings"),
    }
    config["llm"]["can_predict_extra_tokens"] = True
    config["data_formatter"]["pointing_format"] = "tokens"
    # mask_repeats: of the generation only, where "all" and "inference" are the same.
    points = {name: data[name] for name in POINT_SETTINGS if name in data}
    if points.get("mask_repeats") == "all":
        points["mask_repeats"] = "inference"
    return config | points | {"model_name": "molmo_point"}


def _molmo2(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    text, adapter = data["text_config"], data["adapter_config"]
    released = "vision_config" not in data  # the released files name it vit_config, and declare encoder blocks they do not hold
    vision = data["vit_config"] if released else data["vision_config"]
    llm = _renamed(text, MOLMO2_LLM) | rope_settings(text, folder / "config.json")
    llm |= {
        "mlp_hidden_size": 2 * text["intermediate_size"],
        "attention_layer_norm": text.get("use_qk_norm", True),
        "max_sequence_length": text.get("max_position_embeddings", 4096),
    }
    vit = {"image_model_type": "siglip", **_renamed(vision, MOLMO2_VIT)}
    vit["image_pos_patch_size"] = vit.get("image_patch_size", 14)
    vit["float32_attention"] = vision.get("float32_attention", True)
    encoder = VitConfig.from_dict({"image_num_pos": 1, **vit}, str(folder / "config.json"))
    vit.setdefault("image_num_pos", encoder.patches_per_crop)
    same = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    expected = {key: vision[key] for key in same} | {
        "intermediate_size": text["intermediate_size"], "text_hidden_size": text["hidden_size"],
    }  # fmt: skip
    for key, value in expected.items():
        if adapter.get(key, value) != value:
            raise CheckpointError(f"{folder}/config.json: adapter_config.{key}={adapter[key]} differs from {value}; not implemented")
    for key, index in MOLMO2_TOKENS.items():
        if data.get(key) not in (None, text["vocab_size"] + index):
            raise CheckpointError(f"{folder}/config.json: {key}={data[key]}, expected vocab_size + {index} = {text['vocab_size'] + index}")
    return {
        "model_name": "molmo2",
        "llm": llm,
        "vision_backbone": {
            "vit": vit,
            "pooling_attention_mask": adapter.get("pooling_attention_mask", True),
            "vit_layers": adapter.get("vit_layers") or adapter.get("vision_feature_layer") or [24, 18],
            "image_feature_dropout": adapter.get("image_feature_dropout", 0.0),
            "skip_unused_layers": released,
        },
        "data_formatter": {
            "prompt_templates": "uber_model_v2",
            "message_format": "qwen3",
            "system_prompt": "demo_or_style_v2",
            "pointing_format": "html-v2",
        },
        "mm_preprocessor": _molmo2_preprocessor(folder, encoder, data.get("use_frame_special_tokens", True)),
        # Not in the releases' files: Molmo2 sees its image tokens both ways, and MolmoWeb, in the same form, does not.
        "bi_directional_attn": data.get("bi_directional_attn", "image_tokens"),
    }


def _molmo2_preprocessor(folder: Path, encoder: VitConfig, frame_tokens: bool) -> dict[str, Any]:
    """Settings of the processor files; transformers 5 may keep all of them in processor_config.json."""
    processor = read_json(folder / "processor_config.json", missing_ok=True)
    check_pixels(processor, encoder, folder / "processor_config.json")
    parts = []
    for part, own_file in (("image_processor", "preprocessor_config.json"), ("video_processor", "video_preprocessor_config.json")):
        name = "processor_config.json" if processor.get(part) else own_file
        parts.append(processor.get(part) or read_json(folder / name, missing_ok=True))
        if not isinstance(parts[-1], dict):
            raise CheckpointError(f"{folder / name}: {part}={parts[-1]!r} must be a JSON object")
        check_pixels(parts[-1], encoder, folder / name)
    images, videos = parts
    col_tokens = processor.get("image_use_col_tokens", True)
    single = processor.get("use_single_crop_col_tokens")
    settings = {
        "max_crops": images.get("max_crops"),
        "overlap_margins": images.get("overlap_margins"),
        "use_col_tokens": col_tokens,
        # Without processor_config.json: as released. With it, null means "as in the high-resolution part".
        "use_single_crop_col_tokens": (col_tokens if processor else False) if single is None else single,
        "use_single_crop_start_token": processor.get("use_single_crop_start_token", True),
        "per_frame_special_token": processor.get("use_frame_special_tokens", frame_tokens),
        "frame_sample_mode": videos.get("frame_sample_mode"),
        "max_frames": videos.get("num_frames"),
        "max_fps": videos.get("max_fps"),
    }
    for name, sizes in (("pooling", images.get("pooling_size")), ("video_pooling", videos.get("pooling_size"))):
        if sizes is not None:
            if not isinstance(sizes, list) or len(sizes) != 2:
                raise CheckpointError(f"{folder}: pooling_size={sizes!r} of the processor files must be [height, width]")
            settings |= {f"{name}_h": sizes[0], f"{name}_w": sizes[1]}
    return {k: v for k, v in settings.items() if v is not None}


def rope_settings(text: dict[str, Any], source: object) -> dict[str, Any]:
    """Rotary settings of a text configuration in any spelling: rope_theta + rope_scaling, rope_parameters, or those per kind of layer.

    Raises:
        CheckpointError: a setting that is not implemented.
    """
    parameters = text.get("rope_parameters") or text.get("rope_scaling") or {}
    parameters = parameters.get("full_attention", parameters) if isinstance(parameters, dict) else parameters
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{source}: rotary settings {parameters!r} must be a JSON object")
    check_rope(parameters, source)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    settings = {"rope_type": kind, "rope_theta": parameters.get("rope_theta", text.get("rope_theta", 1e4))}
    if kind == "default":
        return settings
    layers = text.get("rope_scaling_layers")
    everything = layers == list(range(text["num_hidden_layers"]))
    return settings | _renamed(parameters, ROPE) | {"rope_scaling_layers": None if everything else layers}


def _renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: data[theirs] for theirs, ours in names.items() if data.get(theirs) is not None}
