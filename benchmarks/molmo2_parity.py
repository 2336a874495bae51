"""Molmo2 beside transformers' own Molmo2: same random weights, same inputs; and FlexAttention beside the dense mask.

    python benchmarks/molmo2_parity.py            # on a GPU: the shapes of Molmo2-4B in bfloat16
    python benchmarks/molmo2_parity.py --tiny     # on any CPU: checks the script

`error` is |a - b| / |b| over all logits, `top1` the share of positions with the same most probable token. In bfloat16 two correct
implementations differ, so each is also compared with transformers in float32 (on the same bfloat16 weights): ours should be no farther
from it than theirs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from molmo_core.checkpoint.layouts import published_links
from molmo_core.checkpoint.links import exporter, model_tensors
from molmo_core.models.molmo2 import Molmo2, Molmo2Config
from molmo_core.preprocessing.image_tokens import grid_tokens, image_tokens
from molmo_core.preprocessing.tiling import ImageSettings, image_tiling, pooled_grid, pooled_patches, single_crop_pooling, token_grids

if TYPE_CHECKING:
    from transformers import Molmo2ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
Batch = dict[str, torch.Tensor]


def native_twin(model: Molmo2) -> Molmo2ForConditionalGeneration:
    """transformers' Molmo2 with the weights of ours, on the same device, in the same dtype."""
    from transformers import Molmo2ForConditionalGeneration
    from transformers.models.molmo2.configuration_molmo2 import Molmo2Config as NativeConfig

    llm, vision = model.config.llm, model.config.vision_backbone
    assert vision is not None
    vit, tokens = vision.vit, model.config.image_tokens
    heads = {
        "num_attention_heads": vit.image_num_heads,
        "num_key_value_heads": vit.image_num_key_value_heads,
        "head_dim": vit.image_head_dim,
    }
    rope: dict[str, Any] = {"rope_type": llm.rope_type, "rope_theta": llm.rope_theta}
    if llm.rope_type == "yarn":
        rope |= {
            "factor": llm.rope_factor, "attention_factor": llm.rope_attention_factor, "beta_fast": llm.rope_beta_fast,
            "beta_slow": llm.rope_beta_slow, "original_max_position_embeddings": llm.rope_original_max_position_embeddings,
        }  # fmt: skip
    layers = [layer % vit.image_num_layers for layer in vision.vit_layers]
    settings: dict[str, Any] = {
        "text_config": {
            "hidden_size": llm.d_model, "num_attention_heads": llm.n_heads, "num_key_value_heads": llm.kv_heads,
            "head_dim": llm.head_width, "vocab_size": llm.embedding_rows, "additional_vocab_size": llm.additional_vocab_size,
            "num_hidden_layers": llm.n_layers, "intermediate_size": llm.intermediate_size, "rope_parameters": rope,
            "max_position_embeddings": llm.max_position_embeddings or llm.max_sequence_length, "norm_after": llm.norm_after,
            "qk_norm_type": llm.attention_layer_norm_type, "rope_scaling_layers": llm.rope_scaling_layers,
            "rms_norm_eps": llm.layer_norm_eps,
        },
        "vision_config": {
            "hidden_size": vit.image_emb_dim, "intermediate_size": vit.image_mlp_dim, "num_hidden_layers": max(layers) + 1,
            "image_size": list(vit.image_default_input_size), "patch_size": vit.image_patch_size, **heads,
        },
        "adapter_config": {
            "vision_feature_layer": layers, "hidden_size": vit.image_emb_dim, "intermediate_size": llm.intermediate_size,
            "text_hidden_size": llm.d_model, **heads,
        },
        "image_start_token_id": tokens.start, "image_end_token_id": tokens.end, "image_patch_id": tokens.patch,
        "low_res_image_start_token_id": tokens.low_res_start, "frame_start_token_id": tokens.frame_start,
        "frame_end_token_id": tokens.frame_end, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    config = NativeConfig(**settings)
    tensors = model_tensors(model)
    tensor = exporter(tensors, published_links("molmo2_modules", tensors, llm))
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.transformer.ln_f.weight.dtype)
    with model.device:
        twin = Molmo2ForConditionalGeneration(config)
    torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            value = tensor(name)
            assert value is not None
            parameter.copy_(value)
    return twin.eval()


def native_inputs(batch: Batch, image_token_ids: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A batch of one example as the arguments of the native model. Images and frames go the same way through it."""
    ids = batch["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = torch.isin(ids, torch.tensor(image_token_ids, device=ids.device)).long()
    if "images" in batch:
        images, pooling = batch["images"][0], batch["pooled_patches_idx"][0]
        inputs["pixel_values"] = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
        inputs["image_token_pooling"] = pooling
        inputs["image_grids"] = torch.tensor([[len(pooling), 1, 0, 0]], device=ids.device)
        inputs["image_num_crops"] = torch.tensor([len(images)], device=ids.device)
    return inputs


def batch_of(config: Molmo2Config, device: torch.device, frames: int = 0, size: tuple[int, int] = (768, 1024), words: int = 512) -> Batch:
    """A prompt with an image of `size`, or with a video of `frames` frames, and random words."""
    settings, tokens = config.image_settings(), config.image_tokens
    text = torch.randint(1, config.llm.vocab_size, (words,))
    if frames:
        pooling = (config.mm_preprocessor.video_pooling_h, config.mm_preprocessor.video_pooling_w)
        frame = grid_tokens(pooled_grid(settings.crop_grid, pooling), tokens.patch, tokens.frame_start, tokens.frame_end)
        media = torch.cat([torch.cat([text[4 * i : 4 * i + 4], torch.from_numpy(frame)]) for i in range(frames)])
        index = torch.cat([torch.from_numpy(single_crop_pooling(settings, pooling, i)) for i in range(frames)])
        crops = frames
    else:
        tiling = image_tiling(*size, settings)
        media = torch.from_numpy(image_tokens(token_grids(tiling, settings), _names(config), settings))
        index, crops = torch.from_numpy(pooled_patches(tiling, settings).copy()), 1 + (tiling.rows * tiling.cols if tiling else 0)
    shape = (1, crops, settings.patches_per_crop, settings.patch_size**2 * 3)
    batch = {"input_ids": torch.cat([text[:1], media, text])[None], "pooled_patches_idx": index[None]}
    return {k: v.to(device) for k, v in batch.items()} | {"images": torch.randint(0, 256, shape, dtype=torch.uint8, device=device)}


def _names(config: Molmo2Config) -> Any:
    tokens = config.image_tokens
    return SimpleNamespace(
        image_start_token_id=tokens.start, image_end_token_id=tokens.end, image_patch_token_id=tokens.patch,
        image_col_token_id=tokens.col, low_res_image_start_token_id=tokens.low_res_start,
    )  # fmt: skip


def packed(parts: list[Batch], settings: ImageSettings) -> Batch:
    """Several examples as one sequence."""
    width = max(p["pooled_patches_idx"].shape[-1] for p in parts)
    index, offset = [], 0
    for part in parts:
        own = part["pooled_patches_idx"]
        moved = torch.where(own >= 0, own + offset, -1)
        index.append(torch.nn.functional.pad(moved, (0, width - own.shape[-1]), value=-1))
        offset += part["images"].shape[1] * settings.patches_per_crop
    ids = [part["input_ids"] for part in parts]
    return {
        "input_ids": torch.cat(ids, 1),
        "position_ids": torch.cat([torch.arange(i.shape[1], device=i.device) for i in ids])[None],
        "subsegment_ids": torch.cat([torch.full_like(i, 100_000 * n) for n, i in enumerate(ids)], 1),
        "images": torch.cat([part["images"] for part in parts], 1),
        "pooled_patches_idx": torch.cat(index, 1),
    }


def compare(what: str, ours: torch.Tensor, theirs: torch.Tensor, **more: Any) -> None:
    a, b = ours.float(), theirs.float()
    error, same = ((a - b).norm() / b.norm()).item(), (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    print(json.dumps({"what": what, "positions": a.shape[1], "error": float(f"{error:.3g}"), "top1": round(same, 4), **more}), flush=True)


def timed(run: Any, device: torch.device) -> tuple[torch.Tensor, float]:
    """Result and milliseconds of the second call."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, round(1e3 * (time.perf_counter() - start), 2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model in float32, for a check of the script")
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny or not torch.cuda.is_available() else "cuda")
    overrides = [
        "llm.d_model=64", "llm.n_layers=2", "llm.n_heads=4", "llm.n_kv_heads=2", "llm.head_dim=16", "llm.mlp_hidden_size=256",
        "llm.vocab_size=512", "llm.embedding_size=512",
    ]  # fmt: skip
    config = Molmo2Config.load(ROOT / "configs/models/molmo2-4b.yaml", overrides if args.tiny else None)
    if args.tiny:
        assert config.vision_backbone is not None
        vit = config.vision_backbone.vit
        vit.image_emb_dim, vit.image_num_heads, vit.image_num_key_value_heads, vit.image_head_dim, vit.image_mlp_dim = 32, 2, 2, 16, 64
    print(json.dumps({"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}), flush=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if args.tiny else torch.bfloat16)
    with device:
        model = Molmo2(config).eval()
    torch.set_default_dtype(torch.float32)
    twin = native_twin(model)
    words, frames = (16, 2) if args.tiny else (512, 32)
    batches = {"image": batch_of(config, device, words=words), "video": batch_of(config, device, frames, words=words)}
    both = packed(list(batches.values()), config.image_settings())
    image_ids = config.image_tokens.all

    logits, theirs = {}, {}
    for name, batch in batches.items():
        logits[name], ms = timed(lambda batch=batch: model(**batch).logits, device)
        inputs = native_inputs(batch, image_ids)
        theirs[name], native_ms = timed(lambda inputs=inputs: twin(**inputs).logits, device)
        compare(f"{name}: ours and transformers, {logits[name].dtype}", logits[name], theirs[name], ms=ms, transformers_ms=native_ms)
    dense, ms = timed(lambda: model(**both).logits, device)
    cut = batches["image"]["input_ids"].shape[1]
    compare("packed and separate", dense, torch.cat([logits["image"], logits["video"]], 1))
    model.attention_implementation = "flex"
    flex, flex_ms = timed(lambda: model(**both).logits, device)
    compare("packed: FlexAttention and dense mask", flex, dense, ms=flex_ms, dense_ms=ms, image=cut)
    twin = twin.float()
    for name, batch in batches.items():
        exact = twin(**native_inputs(batch, image_ids)).logits
        compare(f"{name}: ours and transformers in float32", logits[name], exact)
        compare(f"{name}: transformers and transformers in float32", theirs[name], exact)


if __name__ == "__main__":
    main()
