"""The vision transformer: CLIP, SigLIP, DINOv2 and MetaCLIP styles, over patchified images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from molmo_core.nn.configs import VitConfig
from molmo_core.nn.mlp import VitMlp
from molmo_core.nn.recompute import Recompute, recomputed


class MultiHeadAttention(nn.Module):
    """Attention with biased projections; also the pooling attention of the connector (other query, other widths)."""

    def __init__(self, size_in: int, size_out: int, heads: int, head_dim: int, kv_heads: int, out_layer: bool = True):
        """`out_layer`: end with a projection to `size_out`; without it the output is as wide as all heads."""
        super().__init__()
        self.head_dim = head_dim
        self.share = heads // kv_heads
        self.wq = nn.Linear(size_in, heads * head_dim)
        self.wk = nn.Linear(size_in, kv_heads * head_dim)
        self.wv = nn.Linear(size_in, kv_heads * head_dim)
        self.wo = nn.Linear(heads * head_dim, size_out) if out_layer else nn.Identity()

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None = None, dropout: float = 0.0) -> torch.Tensor:
        """queries [N, Q, in], keys [N, K, in], mask bool [N, 1, 1, K] -> [N, Q, out]."""
        projected = (self.wq(queries), self.wk(keys), self.wv(keys))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected)
        if self.share > 1:
            k, v = k.repeat_interleave(self.share, dim=1), v.repeat_interleave(self.share, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout if self.training else 0.0)
        return self.wo(out.transpose(1, 2).flatten(-2))


class VitBlock(nn.Module):
    """Pre-norm block; DINOv2 scales each branch by a learned vector."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        size = config.image_emb_dim
        self.attention = MultiHeadAttention(size, size, config.image_num_heads, config.image_head_dim, config.image_num_key_value_heads)
        self.feed_forward = VitMlp(size, config.image_mlp_dim, config.image_mlp_activations)
        self.attention_norm = nn.LayerNorm(size, eps=config.image_norm_eps)
        self.ffn_norm = nn.LayerNorm(size, eps=config.image_norm_eps)
        if config.image_model_type == "dino":
            self.lambda1 = nn.Parameter(torch.ones(size))
            self.lambda2 = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, tokens, D] -> same."""
        return recomputed(self._run, x, self.recompute if self.training else "none")

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        scaled = self.config.image_model_type == "dino"
        normed = self.attention_norm(x)
        branch = self._dropout(self.attention(normed, normed, dropout=self.config.attention_dropout))
        x = x + (branch * self.lambda1 if scaled else branch)
        branch = self._dropout(self.feed_forward(self.ffn_norm(x)))
        return x + (branch * self.lambda2 if scaled else branch)

    def _dropout(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.residual_dropout, self.training)


class ResidualBlocks(nn.Module):
    """Level of the published parameter names (`image_vit.transformer.resblocks`)."""

    def __init__(self, config: VitConfig, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(VitBlock(config) for _ in range(layers))


class VisionTransformer(nn.Module):
    """Patch embedding, class token, positions and blocks; there is no final norm and no head.

    Args:
        config: the encoder.
        layers: number of blocks to build (default all): those above the last used one can be left out.
    """

    def __init__(self, config: VitConfig, layers: int | None = None):
        super().__init__()
        self.config = config
        size = config.image_emb_dim
        self.patch_embedding = nn.Linear(config.image_patch_size**2 * 3, size, bias=config.image_model_type in ("siglip", "dino"))
        self.positional_embedding = nn.Parameter(torch.empty(config.image_num_pos, size))
        if config.has_class_token:
            self.class_embedding = nn.Parameter(torch.empty(size))
        if config.image_model_type in ("openai", "metaclip"):
            self.pre_ln = nn.LayerNorm(size, eps=config.image_norm_eps)
        self.transformer = ResidualBlocks(config, layers or config.image_num_layers)

    def reset_parameters(self) -> None:
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name or "pre_ln" in name or "lambda" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def forward(self, patches: torch.Tensor, grid: tuple[int, int] | None = None) -> list[torch.Tensor]:
        """Encodes crops.

        Args:
            patches: normalised pixels [N, rows·cols, patch·patch·3], (row, col, channel) inside a patch.
            grid: rows and columns of patches, if not the configured ones (positions are then interpolated).

        Returns:
            The output of every block, each [N, (1 +) rows·cols, D]; the class token, where there is one, comes first.
        """
        x = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        if self.config.has_class_token:
            x = torch.cat((self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x), dim=1)
        x = x + self._positions(grid or self.config.grid).to(x.dtype)
        if self.config.image_model_type in ("openai", "metaclip"):
            x = self.pre_ln(x)
        x = F.dropout(x, self.config.image_dropout_rate, self.training)
        outputs = []
        for block in self.transformer.resblocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """[(1 +) rows·cols, D], resized from the stored grid if it differs."""
        table = self.positional_embedding
        special = int(self.config.has_class_token)
        height, width = self.config.image_default_input_size
        stored = (height // self.config.image_pos_patch_size, width // self.config.image_pos_patch_size)
        if stored[0] * stored[1] != table.shape[0] - special:  # a table of a square grid of another input size
            side = int((table.shape[0] - special) ** 0.5)
            stored = (side, side)
        if grid == stored:
            return table
        image = table[special:].float().unflatten(0, stored).permute(2, 0, 1)[None]
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=True)
        return torch.cat((table[:special].float(), image[0].flatten(1).T))
