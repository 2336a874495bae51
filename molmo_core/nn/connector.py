"""The vision backbone: encoder, padding embedding, pooling of patches into tokens, projection to the width of the language model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from molmo_core.config import ConfigError
from molmo_core.nn.configs import NORMALISATION, LlmConfig, MolmoVisionBackboneConfig, VitConfig
from molmo_core.nn.host import constant
from molmo_core.nn.mlp import GatedMlp
from molmo_core.nn.recompute import Recompute, recomputed
from molmo_core.nn.vit import MultiHeadAttention, VisionTransformer

_WIDER = {"attention_2wide": 2, "attention_meanq_2x": 2, "attention_meanq_4x": 4}


def normalise_pixels(pixels: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """uint8 pixels with the channel fastest on the last axis -> normalised `dtype`."""
    mean, std = (constant(values, pixels.device) for values in NORMALISATION[kind])
    x = pixels.unflatten(-1, (-1, 3)).float() / 255
    return ((x - mean) / std).flatten(-2).to(dtype)


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Pixels [..., 3, H, W] -> patches [..., rows·cols, patch·patch·3], ordered (row, col, channel) inside a patch.

    Raises:
        ValueError: not three channels, or H or W is not a multiple of `patch`.
    """
    channels, height, width = images.shape[-3:]
    if channels != 3 or height % patch or width % patch:
        raise ValueError(f"images are [B, N, 3, H, W] with H and W multiples of {patch}, got {tuple(images.shape)}")
    x = images.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [..., 3, rows, patch, cols, patch]
    return x.movedim(-5, -1).transpose(-4, -3).flatten(-3).flatten(-3, -2)


class MolmoVisionBackbone(nn.Module):
    """`vision_backbone.{image_vit, pad_embed, image_pooling_2d, image_projector}`."""

    def __init__(self, config: MolmoVisionBackboneConfig, llm: LlmConfig):
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        vit = config.vit
        self.layers = used_layers(config)
        self.image_vit = VisionTransformer(vit, max(self.layers) + 1 if config.skip_unused_layers else None)
        width = vit.image_emb_dim * len(self.layers)
        if config.image_padding_embed is not None:
            pair = config.image_padding_embed == "pad_and_partial_pad"
            self.pad_embed = nn.Parameter(torch.zeros(2, width) if pair else torch.zeros(width))
        if config.positional_embeddings is not None:
            self.positional_embeddings = nn.Parameter(torch.zeros(config.positional_embeddings, width))
        pooled = width
        if "attention" in config.image_pooling_2d:
            scale = _WIDER.get(config.image_pooling_2d, 1)
            pooled = vit.image_emb_dim * scale
            self.image_pooling_2d = MultiHeadAttention(
                width, pooled, vit.image_num_heads, vit.image_head_dim * scale, vit.image_num_key_value_heads, config.pooling_out_layer
            )
            pooled = pooled if config.pooling_out_layer else vit.image_num_heads * vit.image_head_dim * scale
        elif config.image_pooling_2d == "stack":
            pooled = 4 * width
        if config.image_projector == "mlp":
            self.image_projector: nn.Module = GatedMlp(pooled, llm.intermediate_size, llm.d_model)
        else:
            self.image_projector = nn.Linear(pooled, llm.d_model, bias=False)

    def reset_parameters(self) -> None:
        self.image_vit.reset_parameters()
        self.reset_connector_parameters()

    def reset_connector_parameters(self) -> None:
        """Everything but the encoder."""
        std = self.config.vit.initializer_range
        for name, parameter in self.named_parameters():
            if name.startswith("image_vit."):
                continue
            if name in ("pad_embed", "positional_embeddings") or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "image_projector.weight":
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def forward(
        self, images: torch.Tensor, image_masks: torch.Tensor | None, *pooled_idx: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Image features for the language model.

        Args:
            images: [B, crops, patches, patch·patch·3] or [B, crops, 3, H, W]; uint8 pixels are normalised here, floats are taken as
                already normalised.
            image_masks: float [B, crops, patches], share of real pixels of a patch; only encoders that pad use it (None: all real).
            pooled_idx: one or several int64 [B, n, k] (low and high resolution): the patches of each token, into the flattened
                (crops, patches) axis, -1 = absent.

        Returns:
            For each index tensor: features [B, n, d] and valid bool [B, n] (a token with no patch at all is not valid).
        """
        return self.pool(self.patch_features(images, image_masks), *pooled_idx)

    def patch_features(self, images: torch.Tensor, image_masks: torch.Tensor | None = None) -> torch.Tensor:
        """Patch features [B, crops·patches, P] of the selected layers, with the padding embedding."""
        vit, grid = self.config.vit, None
        if images.dim() == 5:
            grid = (images.shape[-2] // vit.image_patch_size, images.shape[-1] // vit.image_patch_size)
            images = patchify(images, vit.image_patch_size)
        self._check(images, grid or vit.grid)
        if images.dtype == torch.uint8:
            images = normalise_pixels(images, vit.normalize, torch.float32)
        batch = images.shape[0]
        outputs = self.image_vit(images.flatten(0, 1), grid)
        features = torch.cat([outputs[layer] for layer in self.layers], dim=-1)[:, int(vit.has_class_token) :]
        features = features.unflatten(0, (batch, -1))
        if self.config.image_padding_embed is not None:
            features = self._add_padding_embedding(features, image_masks)
        return F.dropout(features, self.config.image_feature_dropout, self.training).flatten(1, 2)

    def blank_features(self, batch: int) -> torch.Tensor:
        """Features [B, 1, d] of a blank crop, so that every parameter takes part."""
        vit = self.config.vit
        device = self.image_vit.positional_embedding.device  # of a shard: the encoder gathers its own parameters
        images = torch.zeros(batch, 1, vit.patches_per_crop, vit.image_patch_size**2 * 3, device=device)
        masks = torch.zeros(batch, 1, vit.patches_per_crop, device=device)
        window = 4 if self.config.image_pooling_2d == "stack" else 1
        idx = torch.zeros(batch, 1, window, dtype=torch.int64, device=device)
        return self(images, masks, idx)[0][0]

    def pool(self, features: torch.Tensor, *pooled_idx: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pools and projects: features [B, patches, P], each idx int64 [B, n, k] -> [B, n, d], valid bool [B, n].

        The projector runs once: all ranks of a sharded model must call it equally often.

        Raises:
            ValueError: an index of a patch that is not there (CPU only: on a GPU the look would wait for the device).
        """
        for idx in pooled_idx:
            if features.device.type == "cpu" and idx.numel() and int(idx.max()) >= features.shape[1]:
                raise ValueError(f"a token reads patch {int(idx.max())}, but the images have {features.shape[1]} (crops · patches)")
        projected = recomputed(lambda x: self._project(x, *pooled_idx), features, self.recompute if self.training else "none")
        parts = projected.split([idx.shape[0] * idx.shape[1] for idx in pooled_idx])
        return [(part.unflatten(0, idx.shape[:2]), (idx >= 0).any(-1)) for part, idx in zip(parts, pooled_idx)]

    def compile_connector(self, **kwargs: Any) -> None:
        """Compiles what is neither encoder nor indexing (`torch.compile` arguments)."""
        self._project = torch.compile(self._project, **kwargs)  # type: ignore[method-assign]

    def _project(self, features: torch.Tensor, *pooled_idx: torch.Tensor) -> torch.Tensor:
        """[tokens of all index tensors, d]."""
        rows = torch.arange(features.shape[0], device=features.device)[:, None, None]
        pooled = []
        for idx in pooled_idx:
            present = idx >= 0
            windows = features[rows, idx.clamp(min=0)] * present[..., None].to(features.dtype)
            if self.config.positional_embeddings is not None:  # absent patches have a place, too
                windows = windows + self.positional_embeddings[: windows.shape[2]].to(windows.dtype)
            pooled.append(self._pool_windows(windows.flatten(0, 1), present.flatten(0, 1)))
        return self.image_projector(torch.cat(pooled))

    def _pool_windows(self, windows: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """windows [N, k, P], present bool [N, k] -> [N, pooled width]."""
        kind = self.config.image_pooling_2d
        if kind == "stack":
            return windows.flatten(1)
        if kind == "none":
            if windows.shape[1] != 1:
                raise ConfigError(f"vision_backbone.image_pooling_2d='none' takes one patch a token, the index has {windows.shape[1]}")
            return windows[:, 0]
        count = present.sum(1, keepdim=True).clamp(min=1).to(windows.dtype)
        if kind == "mean":
            return windows.sum(1) / count
        mask = None
        if self.config.pooling_attention_mask:
            # Tokens without any patch are dropped later; let them see their zeros, so that nothing becomes NaN.
            mask = (present | ~present.any(1, keepdim=True))[:, None, None]
        if "meanq" not in kind:
            query = windows[:, :1]
        elif self.config.pooling_attention_mask:
            query = (windows.sum(1) / count)[:, None]
        else:
            query = windows.mean(1, keepdim=True)
        return self.image_pooling_2d(query, windows, mask)[:, 0]

    def _add_padding_embedding(self, features: torch.Tensor, image_masks: torch.Tensor | None) -> torch.Tensor:
        if image_masks is None:
            warnings.warn(
                "images without image_masks: every patch is taken as a real one, which is right for square images only (the preprocessor "
                "returns the masks beside the images)",
                stacklevel=2,
            )
            return features
        mask = image_masks[..., None].to(features.dtype)
        embedding = self.pad_embed.to(features.dtype)
        if self.config.image_padding_embed == "regress":
            return features + embedding * mask.clamp(min=0)
        if self.config.image_padding_embed == "pad_embed":
            return features + embedding * (mask == 0)
        return features + embedding[0] * (mask == 0) + embedding[1] * ((mask < 1) & (mask != 0))

    def _check(self, images: torch.Tensor, grid: tuple[int, int]) -> None:
        vit: VitConfig = self.config.vit
        values = vit.image_patch_size**2 * 3
        if images.dim() != 4 or images.shape[-1] != values or images.shape[-2] != grid[0] * grid[1]:
            raise ValueError(
                f"images are patches [B, crops, {grid[0] * grid[1]}, {values}] or pixels [B, crops, 3, H, W], got {tuple(images.shape)}"
            )


def used_layers(config: MolmoVisionBackboneConfig) -> list[int]:
    """Indices of the encoder blocks whose outputs are used, in order."""
    total = config.vit.image_num_layers
    layers = [layer % total if -total <= layer < total else total for layer in config.vit_layers]
    if not layers or max(layers) >= total:
        raise ConfigError(f"vision_backbone.vit_layers={config.vit_layers}: the encoder has {total} layers")
    return layers
