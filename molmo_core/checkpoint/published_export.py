"""Our configuration -> config.json and the processor, generation and chat files of the published layouts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_core.checkpoint.folder import CheckpointError
from molmo_core.checkpoint.layouts import Layout
from molmo_core.checkpoint.published_settings import (
    DENSE_LLM,
    MOLMO2_LLM,
    MOLMO2_TOKENS,
    MOLMO2_VIT,
    POINT_SETTINGS,
    POINT_TOKEN_NAMES,
    ROPE,
)
from molmo_core.nn.configs import NORMALISATION, LlmConfig, MolmoVisionBackboneConfig
from molmo_core.tokens import SPECIAL_TOKENS

if TYPE_CHECKING:
    from molmo_core.model_configs.molmo import MolmoConfig
    from molmo_core.model_configs.molmo2 import Molmo2Config
    from molmo_core.model_configs.molmo_point import MolmoPointConfig
    from molmo_core.preprocessing.tokenizer import Tokenizer

_REPOSITORY = {"molmo": "allenai/Molmo-7B-D-0924", "molmoe": "allenai/MolmoE-1B-0924", "molmo2": "allenai/Molmo2-8B",
               "molmo_point": "allenai/MolmoPoint-8B"}  # fmt: skip

POINT_NAMES = 31_200
"""Image tokens, patches and cells that the published MolmoPoint tokenizer has names for."""

_MOLMO_TEMPLATE = """\
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate: user, assistant, ...') }}{%- endif -%}
{%- set text = message['content'] if message['content'] is string else message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
{%- if message['role'] == 'user' -%}{{ ' User: ' + text + ' Assistant:' }}{%- else -%}{{ ' ' + text }}{%- endif -%}
{%- endfor -%}
"""  # noqa: E501
_MOLMO2_TEMPLATE = """\
{%- set media = namespace(images=0, videos=0, seen=0) -%}
{%- for message in messages if message['content'] is not string -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{%- set media.images = media.images + 1 -%}{%- elif item['type'] == 'video' -%}{%- set media.videos = media.videos + 1 -%}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- for number in range(1, media.images + 1) -%}{{ ('Image ' ~ number if media.images > 1 else '') + '<|image|>' }}{%- endfor -%}
{%- for number in range(media.videos) -%}{{ '<|video|>' }}{%- endfor -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate: user, assistant, ...') }}{%- endif -%}
{%- set text = message['content'] if message['content'] is string else message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
{%- if message['role'] == 'user' -%}
{{ ('<|im_end|>\\n' if not loop.first else '') + '<|im_start|>user\\n' + text + '<|im_end|>\\n' }}
{%- if not loop.last or add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
{%- else -%}{{ text + eos_token }}{%- endif -%}
{%- endfor -%}
"""  # noqa: E501


def published_layout_of(config: Any) -> Layout:
    """The published layout of a model's weights.

    Raises:
        CheckpointError: the published layouts cannot express this model; the message says why.
    """
    kind = config.model_name
    if kind not in ("molmo", "molmo2", "molmo_point"):
        raise CheckpointError(f"{kind} has no published layout; export it with --format native")
    if config.vision_backbone is None:
        raise CheckpointError("a text-only model has no published Molmo layout; export it with --format native")
    if kind == "molmo":
        return "molmoe" if config.llm.block_type == "moe" else "molmo"
    llm, vision = config.llm, config.vision_backbone
    required = {
        "llm.block_type": (llm.block_type, "sequential"),
        "llm.attention_layer_norm": (llm.attention_layer_norm, True),
        "llm.clip_qkv": (llm.clip_qkv, None),
        "llm.scale_logits": (llm.scale_logits, False),
        "llm.normalize_input_embeds": (llm.normalize_input_embeds, False),
        "vision_backbone.vit.image_model_type": (vision.vit.image_model_type, "siglip"),
        "vision_backbone.vit.normalize": (vision.vit.normalize, "siglip"),
        "vision_backbone.vit.resize_mode": (vision.vit.resize_mode, "siglip"),
        "vision_backbone.image_pooling_2d": (vision.image_pooling_2d, "attention_meanq"),
        "vision_backbone.pooling_attention_mask": (vision.pooling_attention_mask, True),
        "vision_backbone.image_projector": (vision.image_projector, "mlp"),
        "vision_backbone.image_padding_embed": (vision.image_padding_embed, None),
        "bi_directional_attn": (config.bi_directional_attn, "image_tokens"),
    }
    required |= _point_requirements(config) if kind == "molmo_point" else _requirements_without_points(vision)
    wrong = [f"{key}={value!r} (needs {need!r})" for key, (value, need) in required.items() if value != need]
    if wrong:
        name = "MolmoPoint" if kind == "molmo_point" else "Molmo2"
        raise CheckpointError(f"the published {name} layout cannot express {', '.join(wrong)}; export with --format native")
    return kind


def _requirements_without_points(vision: MolmoVisionBackboneConfig) -> dict[str, tuple[Any, Any]]:
    return {
        "vision_backbone.pooling_out_layer": (vision.pooling_out_layer, True),
        "vision_backbone.positional_embeddings": (vision.positional_embeddings, None),
    }


def _point_requirements(config: MolmoPointConfig) -> dict[str, tuple[Any, Any]]:
    """What the published MolmoPoint classes compute with these values only."""
    return {
        "patch_embedding_kind": (config.patch_embedding_kind, "image_feature0"),
        "embed_selected_vit_patch": (config.embed_selected_vit_patch, "linear"),
        "embed_location": (config.embed_location, False),
        "norm_logits": (config.norm_logits, True),
        "llm.additional_vocab_size": (config.llm.additional_vocab_size, 128),
    }


def write_published_files(folder: Path, config: Any, layout: Layout, tokenizer: Tokenizer, dtype: str) -> None:
    """Everything beside the weights: configuration, tokenizer, chat template, generation and processor settings."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    if layout == "molmo2":
        files = {"config.json": _molmo2(config) | ids, **_molmo2_processor(config)}
        template = _MOLMO2_TEMPLATE
    elif layout == "molmo_point":
        files = {"config.json": _molmo_point(config) | ids, **_molmo2_processor(config)}
        template = _MOLMO2_TEMPLATE
    else:
        files = {"config.json": _molmo(config, layout), "preprocessor_config.json": _molmo_processor(config, layout)}
        template = _MOLMO_TEMPLATE
    files["config.json"]["dtype"] = files["config.json"]["torch_dtype"] = dtype
    files["generation_config.json"] = {**ids, "max_new_tokens": 200}
    tokenizer.save(folder)
    if layout == "molmo_point":
        _add_point_tokens(folder / "tokenizer.json", config.llm.embedding_rows)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def is_released_architecture(config: MolmoConfig, layout: Layout) -> bool:
    """Whether the code of the 0924 releases computes this model (the vision settings of the dense ones are part of that code)."""
    vision, llm = config.vision_backbone, config.llm
    assert vision is not None
    released = MolmoVisionBackboneConfig.from_dict({"image_padding_embed": "pad_and_partial_pad", "skip_unused_layers": False})
    same = [
        layout == "molmoe" or dataclasses.replace(vision.vit, init_path=None) == released.vit,
        layout == "molmoe" or [layer % vision.vit.image_num_layers for layer in vision.vit_layers] == [21, 14],
        config.bi_directional_attn is None,
        llm.block_type != "llama"
        and llm.rope_type == "default"
        and (llm.attention_layer_norm_type == "olmo" or not llm.attention_layer_norm),
        llm.head_width * llm.n_heads == llm.d_model,
        config.mm_preprocessor.crop_mode == "overlap-and-resize-c2",
        config.mm_preprocessor.use_col_tokens,
    ]
    names = ("image_pooling_2d", "pooling_attention_mask", "image_projector", "image_padding_embed", "skip_unused_layers")
    return all(same) and all(getattr(vision, name) == getattr(released, name) for name in names)


def _molmo(config: MolmoConfig, layout: Layout) -> dict[str, Any]:
    """config.json of the 0924 releases; of another architecture: our structure, as the research code's later exports have it."""
    common = {
        "architectures": ["MolmoForCausalLM"],
        "auto_map": _code(layout, AutoConfig=f"config_{layout}.MolmoConfig", AutoModelForCausalLM=f"modeling_{layout}.MolmoForCausalLM"),
        "model_type": "molmo",
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    llm = config.llm
    if not is_released_architecture(config, layout):
        nested = {k: v for k, v in config.as_dict().items() if k != "model_name"}
        nested["llm"] |= {"init_path": None, "tokenizer": {"identifier": "."}}
        nested["vision_backbone"]["vit"]["init_path"] = None
        return {k: v for k, v in common.items() if k != "auto_map"} | nested
    if layout == "molmoe":
        return common | _own_names(config)
    theirs = {ours: name for name, ours in DENSE_LLM.items()}
    names = ("d_model", "n_heads", "n_layers", "max_sequence_length", "vocab_size", "rope_theta", "layer_norm_eps", "qkv_bias",
             "clip_qkv", "weight_tying", "attention_layer_norm", "norm_after")  # fmt: skip
    settings = {theirs.get(name, name): getattr(llm, name) for name in names}
    settings |= {
        "num_key_value_heads": llm.kv_heads, "intermediate_size": 2 * llm.intermediate_size, "embedding_size": llm.embedding_rows,
        "layer_norm_type": "rms", "use_position_ids": True, "initializer_range": llm.initializer_range,
    }  # fmt: skip
    return common | settings | _formatting(config)


def _own_names(config: MolmoConfig) -> dict[str, Any]:
    """MolmoE's config.json: the settings of the training code, flat."""
    vision = config.vision_backbone
    assert vision is not None
    llm = {f.name: getattr(config.llm, f.name) for f in dataclasses.fields(LlmConfig) if f.name not in ("tokenizer", "init_path")}
    llm |= {"embedding_size": config.llm.embedding_rows, "activation_type": "swiglu", "layer_norm_type": "rms", "rope": True,
            "rope_impl": "llama", "use_position_ids": True, "moe_dropless": True}  # fmt: skip
    vit = dataclasses.asdict(dataclasses.replace(vision.vit, init_path=None))
    connector = ("image_projector", "image_padding_embed", "vit_layers", "image_feature_dropout")
    settings = {name: getattr(vision, name) for name in connector}
    settings["image_pooling_2d"] = vision.image_pooling_2d.replace("_", "-")
    llm = {k: v for k, v in llm.items() if not k.startswith("rope_") or k == "rope_theta"}
    return llm | settings | {"vision_backbone": vit} | _formatting(config)


def _formatting(config: MolmoConfig) -> dict[str, Any]:
    formatter, images = config.data_formatter, config.mm_preprocessor
    return {
        "system_prompt_kind": formatter.system_prompt, "prompt_type": formatter.prompt_templates,
        "message_formatting": formatter.message_format, "always_start_with_space": formatter.always_start_with_space,
        "default_inference_len": formatter.default_inference_len, "crop_mode": images.crop_mode, "max_crops": images.max_crops,
        "overlap_margins": list(images.overlap_margins), "use_col_tokens": images.use_col_tokens,
        "loss_token_weighting": images.loss_token_weighting, "legacy_image_mask": images.legacy_image_mask,
    }  # fmt: skip


def _molmo_processor(config: MolmoConfig, layout: Layout) -> dict[str, Any]:
    vision = config.vision_backbone
    assert vision is not None
    height, width = vision.vit.grid
    mean, std = NORMALISATION[vision.vit.normalize]
    images = config.mm_preprocessor
    return {
        "auto_map": _code(
            layout,
            AutoImageProcessor="image_preprocessing_molmo.MolmoImageProcessor",
            AutoProcessor="preprocessing_molmo.MolmoProcessor",
        ),
        "base_image_input_size": list(vision.vit.image_default_input_size),
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "image_padding_mask": vision.image_padding_embed is not None,
        "image_patch_size": vision.vit.image_patch_size,
        "image_processor_type": "MolmoImageProcessor",
        "image_token_length_h": -(-height // images.pooling_h),
        "image_token_length_w": -(-width // images.pooling_w),
        "max_crops": images.max_crops,
        "overlap_margins": list(images.overlap_margins),
        "processor_class": "MolmoProcessor",
    }


def _molmo2(config: Molmo2Config) -> dict[str, Any]:
    """config.json in the spelling of the releases, which transformers' own class, the published remote code and vLLM all read."""
    llm, vision = config.llm, config.vision_backbone
    assert vision is not None
    vit = vision.vit
    text = _spelt(llm, MOLMO2_LLM) | {
        "num_key_value_heads": llm.kv_heads, "head_dim": llm.head_width, "vocab_size": llm.embedding_rows,
        "intermediate_size": llm.intermediate_size, "hidden_act": "silu", "tie_word_embeddings": False,
        "max_position_embeddings": llm.max_position_embeddings or llm.max_sequence_length, "rope_theta": llm.rope_theta,
        "rope_scaling": None if llm.rope_type == "default" else {"rope_type": llm.rope_type} | _spelt(llm, ROPE),
        "rope_scaling_layers": llm.rope_scaling_layers,
    }  # fmt: skip
    tower = _spelt(vit, MOLMO2_VIT) | {
        "image_default_input_size": list(vit.image_default_input_size), "float32_attention": True,
    }  # fmt: skip
    adapter = {
        "vit_layers": list(vision.vit_layers), "pooling_attention_mask": True, "hidden_size": vit.image_emb_dim, "hidden_act": "silu",
        "intermediate_size": llm.intermediate_size, "text_hidden_size": llm.d_model, "num_attention_heads": vit.image_num_heads,
        "num_key_value_heads": vit.image_num_key_value_heads, "head_dim": vit.image_head_dim,
        "image_feature_dropout": vision.image_feature_dropout,
    }  # fmt: skip
    tokens = {name: llm.embedding_rows + index for name, index in MOLMO2_TOKENS.items()}
    return {
        "architectures": ["Molmo2ForConditionalGeneration"], "model_type": "molmo2", "tie_word_embeddings": False,
        "auto_map": _code("molmo2", AutoConfig="configuration_molmo2.Molmo2Config",
                          AutoModelForImageTextToText="modeling_molmo2.Molmo2ForConditionalGeneration"),
        "use_frame_special_tokens": config.mm_preprocessor.per_frame_special_token,
        "text_config": text, "vit_config": tower, "adapter_config": adapter, **tokens,
    }  # fmt: skip


def _molmo_point(config: MolmoPointConfig) -> dict[str, Any]:
    """Molmo2's config.json with the settings of points."""
    data, vision = _molmo2(config), config.vision_backbone  # type: ignore[arg-type]
    assert vision is not None
    data["adapter_config"] |= {
        "attention_pooling_out_layer": vision.pooling_out_layer, "positional_embeddings": vision.positional_embeddings,
        "float32_attention": True,
    }  # fmt: skip
    names = {"AutoConfig": "configuration_molmo_point.MolmoPointConfig",
             "AutoModelForImageTextToText": "modeling_molmo_point.MolmoPointForConditionalGeneration"}  # fmt: skip
    tokens = {name: config.llm.embedding_rows + index for name, index in POINT_TOKEN_NAMES.items()}
    return data | {name: getattr(config, name) for name in POINT_SETTINGS} | tokens | {
        "architectures": ["MolmoPointForConditionalGeneration"], "model_type": "molmo_point", "auto_map": _code("molmo_point", **names),
        "low_res_image_start_token_id": None,
    }  # fmt: skip


def _add_point_tokens(path: Path, first: int) -> None:
    """Adds the names that the published code gives to image tokens, patches and cells: text that it reads points from."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows, special = 128, len(SPECIAL_TOKENS["molmo2"])
    names = [f"<EXTRA_TOKENS_POINT_{i}>" for i in range(rows - special)] + [f"<POINT_{i}>" for i in range(POINT_NAMES)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] += [{"id": first + special + i, "content": name, **flags} for i, name in enumerate(names)]
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _spelt(settings: Any, names: dict[str, str]) -> dict[str, Any]:
    """Our settings under their names (where there are two, the released one, which is listed first); those not set are left out."""
    first = {ours: theirs for theirs, ours in reversed(names.items())}
    return {theirs: getattr(settings, ours) for ours, theirs in first.items() if getattr(settings, ours) is not None}


def _code(layout: Layout, **classes: str) -> dict[str, str]:
    """`auto_map`: where the published code lives, for readers that run it (vLLM and older transformers, with trust_remote_code)."""
    return {auto: f"{_REPOSITORY[layout]}--{path}" for auto, path in classes.items()}


def _molmo2_processor(config: Molmo2Config) -> dict[str, dict[str, Any]]:
    assert config.vision_backbone is not None
    vit, media = config.vision_backbone.vit, config.mm_preprocessor
    height, width = vit.image_default_input_size
    pixels = {
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": vit.image_patch_size,
        "size": {"height": height, "width": width},
    }  # fmt: skip
    code = _code("molmo2", AutoProcessor="processing_molmo2.Molmo2Processor",
                 AutoImageProcessor="image_processing_molmo2.Molmo2ImageProcessor",
                 AutoVideoProcessor="video_processing_molmo2.Molmo2VideoProcessor")  # fmt: skip
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": pixels | {
            "image_processor_type": "Molmo2ImageProcessor", "max_crops": media.max_crops,
            "overlap_margins": list(media.overlap_margins), "pooling_size": [media.pooling_h, media.pooling_w],
        },
        "video_preprocessor_config.json": pixels | {
            "video_processor_type": "Molmo2VideoProcessor", "num_frames": media.max_frames, "max_fps": media.max_fps,
            "frame_sample_mode": media.frame_sample_mode, "sampling_fps": media.max_fps, "do_sample_frames": True,
            "pooling_size": [media.video_pooling_h, media.video_pooling_w],
        },
        "processor_config.json": {
            "image_use_col_tokens": media.use_col_tokens,
            "use_single_crop_col_tokens": media.use_single_crop_col_tokens,
            "use_single_crop_start_token": media.use_single_crop_start_token,
            "use_frame_special_tokens": media.per_frame_special_token, "video_use_col_tokens": False,
        },
    }  # fmt: skip
    return {name: content | {"processor_class": "Molmo2Processor", "auto_map": code} for name, content in files.items()}
