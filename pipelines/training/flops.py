"""How much arithmetic a training step is, and what share of a GPU's peak a run reaches (MFU)."""

from __future__ import annotations

from typing import cast

import torch

from molmo_core.models.base import ModelBase
from molmo_core.nn.connector import MolmoVisionBackbone

# Dense bfloat16 FLOP/s of the data sheets.
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device; None for a CPU or a GPU that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)


# Indices [B, n, k] of the patches of each image token, by the names that the models give them.
POOLED = ("pooled_patches_idx", "low_res_pooled_idx", "high_res_pooled_idx", "low_res_tokens_idx", "high_res_tokens_idx")
# Layers that read each patch of a token's window; the others of the pooling, and the projector, read each token once.
PER_PATCH = ("image_pooling_2d.wk.", "image_pooling_2d.wv.")


class StepFlops:
    """FLOPs of forward and backward pass, without recomputation: 6 a weight and position, 12 · width · length a position in attention.

    Embedding tables are looked up, not multiplied; of experts only the chosen ones count. Frozen parts count as if they were trained.
    HeMolmo's first pass and its scorer are not counted.
    """

    def __init__(self, model: ModelBase):
        llm, vision = model.config.llm, cast(MolmoVisionBackbone | None, model.vision_backbone)
        groups = model.parameter_groups()
        self.llm = float(sum(p.numel() for name, p in groups["llm"] if ".wte." not in name))
        if llm.block_type == "moe":
            experts = sum(p.numel() for name, p in groups["llm"] if ".experts." in name)
            self.llm -= experts * (1 - llm.moe_top_k / llm.moe_num_experts)
        if llm.weight_tying:
            self.llm += llm.embedding_rows * llm.d_model
        self.attention = 12.0 * llm.n_layers * llm.n_heads * llm.head_width
        self.vit = self.vit_attention = self.per_token = self.per_patch = 0.0
        if vision is not None:
            self.vit = float(sum(p.numel() for name, p in groups["vit"] if p.ndim == 2 and "embedding" not in name.rpartition(".")[2]))
            vit, blocks = vision.config.vit, len(vision.image_vit.transformer.resblocks)
            self.vit_attention = 12.0 * blocks * vit.image_num_heads * vit.image_head_dim
            self.patch_pixels = vit.image_patch_size**2
            weights = [(name, float(p.numel())) for name, p in groups["connector"] if name.startswith("vision_backbone.") and p.ndim == 2]
            self.per_patch = sum(count for name, count in weights if any(part in name for part in PER_PATCH))
            self.per_token = sum(count for name, count in weights if "pad_embed" not in name) - self.per_patch

    def __call__(self, batch: dict[str, torch.Tensor]) -> float:
        """FLOPs of one local batch."""
        ids = batch["input_ids"]
        language = float(ids.numel()) * (6 * self.llm + self.attention * ids.shape[1] / 2)  # causal: half of the pairs
        return language + self.vision(batch)

    def vision(self, batch: dict[str, torch.Tensor]) -> float:
        """Those of encoder and connector."""
        images = batch.get("images")
        if images is None:
            return 0.0
        crops = images.shape[0] * images.shape[1]
        patches = images.shape[2] if images.ndim == 4 else images.shape[3] * images.shape[4] // self.patch_pixels
        total = crops * patches * (6 * self.vit + self.vit_attention * patches)
        for index in (batch[name] for name in POOLED if batch.get(name) is not None):
            rows, tokens, window = index.shape
            total += 6 * rows * tokens * (self.per_token + window * self.per_patch)
        return total
