"""How much arithmetic a training step is, and what share of a GPU's peak a run reaches (MFU)."""

from __future__ import annotations

import torch

from molmo_core.models.base import ModelBase

# Dense bfloat16 FLOP/s of the data sheets.
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device; None for a CPU or a GPU that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)


class StepFlops:
    """FLOPs of forward and backward pass, without recomputation: 6 a weight and position, 12 · width · length a position in attention.

    Embedding tables are looked up, not multiplied; of experts only the chosen ones count. Frozen parts count as if they were trained.
    """

    def __init__(self, model: ModelBase):
        llm, vision = model.config.llm, getattr(model.config, "vision_backbone", None)
        groups = model.parameter_groups()
        self.llm = float(sum(p.numel() for name, p in groups["llm"] if ".wte." not in name))
        if llm.block_type == "moe":
            experts = sum(p.numel() for name, p in groups["llm"] if ".experts." in name)
            self.llm -= experts * (1 - llm.moe_top_k / llm.moe_num_experts)
        if llm.weight_tying:
            self.llm += llm.embedding_rows * llm.d_model
        self.attention = 12.0 * llm.n_layers * llm.n_heads * llm.head_width
        self.vit = self.connector = self.vit_attention = 0.0
        if vision is not None:
            self.vit = float(sum(p.numel() for name, p in groups["vit"] if p.ndim == 2 and "embedding" not in name.rpartition(".")[2]))
            self.connector = float(sum(p.numel() for name, p in groups["connector"] if ".wte." not in name))
            self.vit_attention = 12.0 * vision.vit.image_num_layers * vision.vit.image_num_heads * vision.vit.image_head_dim

    def __call__(self, batch: dict[str, torch.Tensor]) -> float:
        """FLOPs of one local batch."""
        ids = batch["input_ids"]
        tokens = float(ids.numel())
        total = tokens * (6 * self.llm + self.attention * ids.shape[1] / 2)  # causal: half of the pairs
        images, pooled = batch.get("images"), batch.get("pooled_patches_idx")
        if images is not None and images.ndim == 4:
            patches = float(images.shape[0] * images.shape[1] * images.shape[2])
            total += patches * (6 * self.vit + self.vit_attention * images.shape[2])
        if pooled is not None:
            total += 6 * self.connector * pooled.shape[0] * pooled.shape[1]
        return total
