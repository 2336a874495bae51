"""Random inputs of the sizes that the speed benchmarks share: Molmo2-4B, prompts of 1,400 tokens, packs of 4,096."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molmo_core.models.base import BaseModelConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "llm.d_model=64", "llm.n_layers=2", "llm.n_heads=4", "llm.n_kv_heads=2", "llm.head_dim=16", "llm.mlp_hidden_size=256",
    "llm.vocab_size=1000", "llm.embedding_size=1000", "vision_backbone.vit.image_num_layers=3", "vision_backbone.vit.image_emb_dim=32",
    "vision_backbone.vit.image_num_heads=2", "vision_backbone.vit.image_num_key_value_heads=2", "vision_backbone.vit.image_head_dim=16",
    "vision_backbone.vit.image_mlp_dim=64", "vision_backbone.vit_layers=[-1,-2]",
]  # fmt: skip


def model_config(tiny: bool, name: str = "molmo2-4b") -> Any:
    """The published sizes, or ones that any CPU computes."""
    return BaseModelConfig.load(ROOT / f"configs/models/{name}.yaml", TINY if tiny else [])


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights, drawn where they are used."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = config.build_model()
    model.to(dtype).to_empty(device=device).reset_parameters()
    return model


def prompt(config: Any, rng: np.random.RandomState, length: int, crops: int, image_tokens: int) -> dict[str, np.ndarray]:
    """A prompt with one picture, as a preprocessor gives it: text, image tokens, text."""
    ids = rng.randint(0, config.llm.vocab_size, length).astype(np.int64)
    example = {"input_ids": ids, "position_ids": np.arange(length)}
    if crops:
        vit = config.vision_backbone.vit
        patches = vit.patches_per_crop
        ids[4 : 4 + image_tokens] = config.image_tokens.patch
        example["images"] = rng.randint(0, 255, (crops, patches, vit.image_patch_size**2 * 3), np.uint8)
        example["pooled_patches_idx"] = rng.randint(0, crops * patches, (image_tokens, 4)).astype(np.int64)
    return example


def pack(
    config: Any, rng: np.random.RandomState, rows: int, length: int, crops: int, image_tokens: int, documents: int = 3
) -> dict[str, np.ndarray]:
    """Rows of packed documents with loss on the text, the picture in the first."""
    examples = [prompt(config, rng, length, crops, image_tokens) for _ in range(rows)]
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    image = batch["input_ids"] == config.image_tokens.patch
    bounds = np.linspace(4 + image_tokens + 4, length, documents + 1).astype(int)
    bounds[0] = 0
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        batch.setdefault("subsegment_ids", np.zeros_like(batch["input_ids"]))[:, start:end] = 10_000 + 100_000 * number
        batch["position_ids"][:, start:end] = np.arange(end - start)
    batch["labels"] = np.where(image, -1, rng.randint(0, config.llm.vocab_size, batch["input_ids"].shape))
    batch["loss_masks"] = (~image).astype(np.float32)
    return batch
