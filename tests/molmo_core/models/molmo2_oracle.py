"""transformers' native Molmo2 as an oracle: tiny random models of every variant, and our batches in its words."""

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


def native_inputs(batch: dict[str, torch.Tensor], image_token_ids: list[int]) -> dict[str, torch.Tensor]:
    """One of our batches of one example, as the arguments of the native model. Images and frames go the same way through it."""
    ids = batch["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = torch.isin(ids, torch.tensor(image_token_ids)).long()
    if batch.get("images") is not None:
        images = batch["images"][0]
        pooling = batch["pooled_patches_idx"][0]
        inputs["pixel_values"] = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
        inputs["image_token_pooling"] = pooling
        inputs["image_grids"] = torch.tensor([[len(pooling), 1, 0, 0]])
        inputs["image_num_crops"] = torch.tensor([len(images)])
    return inputs


def our_state(model: Molmo2ForConditionalGeneration, tied: bool) -> dict[str, torch.Tensor]:
    """The native weights under the published key names."""
    native = model.state_dict()
    embedding = native["model.language_model.embed_tokens.weight"]
    state = {"transformer.wte.embedding": embedding[:E], "transformer.wte.new_embedding": embedding[E:]}
    state["transformer.ln_f.weight"] = native["model.language_model.norm.weight"]
    if not tied:
        state["transformer.ff_out.weight"] = native["lm_head.weight"]
    for i in range(model.config.text_config.num_hidden_layers):
        theirs, ours = f"model.language_model.layers.{i}.", f"transformer.blocks.{i}."
        state[ours + "att_proj.weight"] = torch.cat([native[f"{theirs}self_attn.{p}_proj.weight"] for p in "qkv"])
        state[ours + "attn_out.weight"] = native[theirs + "self_attn.o_proj.weight"]
        state[ours + "q_norm.weight"] = native[theirs + "self_attn.q_norm.weight"]
        state[ours + "k_norm.weight"] = native[theirs + "self_attn.k_norm.weight"]
        state[ours + "ff_proj.weight"] = torch.cat([native[theirs + "mlp.up_proj.weight"], native[theirs + "mlp.gate_proj.weight"]])
        state[ours + "ff_out.weight"] = native[theirs + "mlp.down_proj.weight"]
        state[ours + "attn_norm.weight"] = native[theirs + "input_layernorm.weight"]
        state[ours + "ff_norm.weight"] = native[theirs + "post_attention_layernorm.weight"]
    attention = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    vision = {
        "self_attn": "attention",
        "mlp": "feed_forward",
        "fc1": "w1",
        "fc2": "w2",
        "layer_norm1": "attention_norm",
        "layer_norm2": "ffn_norm",
    }
    projector = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for key, value in native.items():
        for prefix, target, names in (
            ("model.vision_tower.layers.", "vision_backbone.image_vit.transformer.resblocks.", attention | vision),
            ("model.vision_tower.", "vision_backbone.image_vit.", {}),
            ("model.multi_modal_projector.image_pooling_2d.", "vision_backbone.image_pooling_2d.", attention),
            ("model.multi_modal_projector.image_projector.", "vision_backbone.image_projector.", projector),
        ):
            if key.startswith(prefix):
                state[target + ".".join(names.get(part, part) for part in key.removeprefix(prefix).split("."))] = value
                break
    return state
