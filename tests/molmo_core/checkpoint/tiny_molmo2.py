"""Tiny Molmo2 models of every variant, here and in transformers."""

from typing import Any

import torch
from transformers import Molmo2ForConditionalGeneration
from transformers.models.molmo2.configuration_molmo2 import Molmo2Config as NativeConfig

E = 448
"""Rows of the golden tokenizer's embedding; special tokens follow."""
YARN = {
    "rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def our_config(tokenizer: str, qk_norm: str, norm_after: bool, yarn_layers: list[int] | None = None, tied: bool = False) -> dict[str, Any]:
    """A tiny Molmo2 of 3 blocks on 56 x 56 crops of 4 x 4 patches, as the data of a `Molmo2Config`."""
    llm = {
        "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "n_layers": 3, "mlp_hidden_size": 192, "vocab_size": 406,
        "embedding_size": E, "rope_theta": 10_000.0, "attention_layer_norm": True, "attention_layer_norm_type": qk_norm,
        "norm_after": norm_after, "weight_tying": tied, "max_sequence_length": 1024, "tokenizer": {"identifier": tokenizer},
    }  # fmt: skip
    if yarn_layers is not None:
        llm |= {
            "rope_type": "yarn", "rope_factor": YARN["factor"], "rope_attention_factor": YARN["attention_factor"],
            "rope_beta_fast": YARN["beta_fast"], "rope_beta_slow": YARN["beta_slow"],
            "rope_original_max_position_embeddings": YARN["original_max_position_embeddings"], "rope_scaling_layers": yarn_layers,
        }  # fmt: skip
    vit = {
        "image_model_type": "siglip", "image_default_input_size": [56, 56], "image_emb_dim": 48, "image_num_heads": 3,
        "image_num_key_value_heads": 3, "image_head_dim": 16, "image_num_layers": 3, "image_mlp_dim": 96,
        "image_mlp_activations": "gelu_pytorch_tanh", "image_num_pos": 16, "image_norm_eps": 1e-6,
    }  # fmt: skip
    return {
        "llm": llm,
        "vision_backbone": {"vit": vit, "vit_layers": [2, 0], "pooling_attention_mask": True},
        "data_formatter": {"prompt_templates": "none", "message_format": "qwen3", "system_prompt": "demo_or_style_v2"},
        "mm_preprocessor": {"max_crops": 4, "overlap_margins": [1, 1], "max_frames": 4},
        "bi_directional_attn": "image_tokens",
    }


def native_config(data: dict[str, Any]) -> NativeConfig:
    """The same model for transformers."""
    llm, vit = data["llm"], data["vision_backbone"]["vit"]
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
    rope = {"rope_theta": llm["rope_theta"], **(YARN if llm.get("rope_type") == "yarn" else {"rope_type": "default"})}
    return NativeConfig(
        text_config={
            "hidden_size": llm["d_model"], "num_attention_heads": llm["n_heads"], "num_key_value_heads": llm["n_kv_heads"],
            "head_dim": llm["head_dim"], "vocab_size": E, "additional_vocab_size": 128, "num_hidden_layers": llm["n_layers"],
            "intermediate_size": llm["mlp_hidden_size"] // 2, "max_position_embeddings": 512, "rope_parameters": rope,
            "qk_norm_type": llm["attention_layer_norm_type"], "norm_after": llm["norm_after"],
            "rope_scaling_layers": llm.get("rope_scaling_layers"),
        },
        vision_config={
            "hidden_size": vit["image_emb_dim"], "intermediate_size": vit["image_mlp_dim"], "num_hidden_layers": 3,
            "image_size": [56, 56], "patch_size": 14, **heads,
        },
        adapter_config={
            "vision_feature_layer": [2, 0], "hidden_size": 48, "intermediate_size": llm["mlp_hidden_size"] // 2, "text_hidden_size": 64,
            **heads,
        },
        image_start_token_id=E, image_end_token_id=E + 1, image_patch_id=E + 2, low_res_image_start_token_id=E + 4,
        frame_start_token_id=E + 7, frame_end_token_id=E + 8, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def native_model(data: dict[str, Any], seed: int = 0) -> Molmo2ForConditionalGeneration:
    """Random weights, wide enough that every part shows in the logits."""
    torch.manual_seed(seed)
    model = Molmo2ForConditionalGeneration(native_config(data)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.2 * torch.randn_like(parameter) if "norm" in name and "weight" in name else 0.08 * torch.randn_like(parameter)
            )
        if data["llm"]["weight_tying"]:
            model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight[:E])
    return model
