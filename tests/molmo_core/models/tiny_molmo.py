"""A Molmo of a few thousand parameters, and inputs that fit it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.preprocessing.tiling import Tiling, pooled_patches, token_grids

VOCABULARY = 60
START, END, PATCH, COL = (VOCABULARY + i for i in range(4))


def tiny_config(**changes: Any) -> MolmoConfig:
    """2 layers of width 32, a SigLIP-like encoder of 4x4 patches, crops that overlap by one patch on each side."""
    llm = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 64, "vocab_size": VOCABULARY, "qkv_bias": True}
    vit = {
        "image_model_type": "siglip", "image_default_input_size": (28, 28), "image_patch_size": 7, "image_pos_patch_size": 7,
        "image_emb_dim": 16, "image_num_heads": 2, "image_num_key_value_heads": 2, "image_head_dim": 8, "image_num_layers": 3,
        "image_mlp_dim": 32, "image_num_pos": 16,
    }  # fmt: skip
    backbone = {"vit": vit, "vit_layers": [-1, -2], "pooling_attention_mask": True} | changes.pop("vision_backbone", {})
    llm |= changes.pop("llm", {})
    return MolmoConfig.new(**({"llm": llm, "vision_backbone": backbone, "mm_preprocessor": {"overlap_margins": (1, 1)}} | changes))


def tiny_model(**changes: Any) -> Molmo:
    torch.manual_seed(0)
    model = Molmo(tiny_config(**changes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model


def example(config: MolmoConfig, tilings: list[Tiling | None], text: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """An example with one image per tiling (None = the whole image as one crop), then `text` random tokens with labels."""
    rng, settings = np.random.RandomState(seed), config.image_settings()
    ids, idx, crops = [1], [], 0
    for tiling in tilings:
        for rows, cols in token_grids(tiling, settings):
            ids += [START, *([PATCH] * cols + [COL]) * rows, END]
        pooled = pooled_patches(tiling, settings)
        idx.append(np.where(pooled >= 0, pooled + crops * settings.patches_per_crop, -1))
        crops += 1 + (tiling.rows * tiling.cols if tiling else 0)
    answer = rng.randint(2, VOCABULARY, text)
    input_ids = np.array([*ids, *answer], np.int64)
    labels = np.full_like(input_ids, -1)
    labels[-text:-1] = answer[1:]
    result = {"input_ids": input_ids, "labels": labels, "loss_masks": (labels >= 0).astype(np.float32)}
    if tilings:
        result["images"] = rng.randint(0, 256, (crops, settings.patches_per_crop, 147)).astype(np.uint8)
        result["pooled_patches_idx"] = np.concatenate(idx)
    return result


def collate(examples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Pads and stacks (ids, labels and indices with -1, everything else with 0)."""
    batch = {}
    for key in {k for e in examples for k in e}:
        fill = -1 if key in ("input_ids", "labels", "pooled_patches_idx") else 0
        arrays = [e[key] for e in examples if key in e]
        shape = [max(sizes) for sizes in zip(*(a.shape for a in arrays))]
        stacked = np.full((len(examples), *shape), fill, arrays[0].dtype)
        for row, e in zip(stacked, examples):
            if key in e:
                row[tuple(slice(n) for n in e[key].shape)] = e[key]
        batch[key] = torch.from_numpy(stacked)
    return batch
