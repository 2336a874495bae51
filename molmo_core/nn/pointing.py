"""Pointing by selection: three small heads on hidden states choose an image token, one of its patches, and a cell of that patch.

A point is three tokens of the text; which image token, patch and cell they stand for is chosen from the hidden state before each, and
what was chosen is added to the embedding of the token itself. Notation: B rows, M image tokens of a row (padded), k patches of a token,
P width of patch features, d of the language model, e of queries and keys.

Source: the published MolmoPoint code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from molmo_core.nn.norm import RMSNorm
from molmo_core.nn.point_configs import PointConfig

NOT_SELECTABLE = -1e8
"""Logit of what can never be chosen."""
MASKED = -1e5
"""Logit of what must not be chosen now; as published it is above that of what never can."""


class PointSources(NamedTuple):
    """What points can be chosen from, of a batch."""

    features: torch.Tensor
    """[B, M, d], what the connector made of each image token."""
    patches: torch.Tensor
    """[B, M, k, P], the patch features of each; zeros where a patch is absent."""
    present: torch.Tensor
    """bool [B, M, k]: the token has that patch."""
    positions: torch.Tensor
    """int64 [B, M]: where the token is in the sequence (0 for padding)."""
    numbers: torch.Tensor
    """int64 [B, M]: selectable tokens before it, of its own example; 0 for the first."""
    selectable: torch.Tensor
    """bool [B, M]: a point can be there (not on padding, nor on tokens of a global crop)."""
    examples: torch.Tensor
    """int64 [B, M]: the number of its example in a pack."""


class _Vector(nn.Module):
    """Level of the published parameter names."""

    def __init__(self, width: int):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))


class PointPredictor(nn.Module):
    """The heads: logits of image tokens, patches and cells from hidden states."""

    def __init__(self, config: PointConfig, width: int, patch_width: int, eps: float, rope_theta: float):
        """`width`: d; `patch_width`: P; `eps`: of the norm; `rope_theta`: where the configuration has none of its own."""
        super().__init__()
        self.config, self.width = config, width
        self.theta = config.token_prediction_rotary_theta or rope_theta
        e = config.patch_embed_dim
        self.patch_q, self.patch_k, self.subpatch_q = (nn.Linear(width, e) for _ in range(3))
        self.subpatch_k = nn.Linear(patch_width, e)
        if config.cells:
            self.subpatch_loc_k = nn.Linear(width, config.cells)
        if config.layer_norm_x:
            self.x_norm = RMSNorm(width, eps)
        if config.no_more_points_class:
            self.add_no_point_class_embed = _Vector(e)

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name == "x_norm.weight":
                nn.init.ones_(parameter)
            elif parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the heads read, [..., d], of the output of the last block."""
        if self.config.layer_norm_x:
            return self.x_norm(hidden).to(hidden.dtype)
        return hidden / self.width**0.5 if self.config.norm_x else hidden

    def token_keys(self, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Keys of image tokens and, last, of the end of a list: x [B, M, d] (normed), numbers int64 [B, M] -> [B, C, e]."""
        keys = self._rotated(self.patch_k(x), numbers)
        if not self.config.no_more_points_class:
            return keys
        end = self.add_no_point_class_embed.vector.to(keys.dtype).expand(len(keys), 1, -1)
        return torch.cat((keys, end), 1)

    def token_logits(
        self, x: torch.Tensor, numbers: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float32 [B, n, C] of the states x [B, n, d] (normed) whose last points are on the tokens with the numbers int64 [B, n].

        `candidates`: int64, [B, n, 1]: how many of the keys are those of the state, if others' are among them.
        """
        logits = (self._rotated(self.patch_q(x), numbers) @ keys.mT).float()
        if not self.config.norm_logits:
            return logits
        return logits / (keys.shape[1] ** 0.5 if candidates is None else candidates.clamp(min=1).float().sqrt())

    def patch_logits(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """float32 [..., k] of states x [..., d] (normed) and keys [..., k, e] of the patches of their tokens."""
        logits = (self.subpatch_q(x)[..., None, :] * keys).float().sum(-1)
        return logits / self.config.patch_embed_dim**0.5 if self.config.norm_logits else logits

    def _rotated(self, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        if self.config.token_prediction_rotary == "none":
            return x
        width = x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            inverse = self.theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=x.device) / width)
            angles = numbers[..., None].float() * inverse
            angles = torch.cat((angles, angles), -1)
            t = x.float()
            first, second = t.chunk(2, -1)
            return (t * angles.cos() + torch.cat((-second, first), -1) * angles.sin()).to(x.dtype)


class PointEmbedding(nn.Module):
    """What is added to the embeddings of the tokens of a point: the image token, patch and cell that they stand for."""

    def __init__(self, config: PointConfig, width: int, patch_width: int, most_patches: int):
        """`width`: d; `patch_width`: P; `most_patches`: the largest k."""
        super().__init__()
        self.config, self.most = config, most_patches
        if config.patch_embedding_kind == "linear":
            self.build_pointing_embedding = nn.Linear(patch_width * most_patches, width)
        if config.embed_selected_vit_patch is not None:
            self.build_vit_embedding = nn.Linear(patch_width, width)
        if config.embed_selected_vit_patch == "linear_with_pos":
            self.vit_pos_embed = nn.Embedding(most_patches, width)
        if config.embed_location and config.cells:
            self.loc_pos_embed = nn.Embedding(config.cells, width)

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "pos_embed" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def of_token(self, features: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """[..., d] for selected tokens: their features [..., d] and patches [..., k, P]."""
        if self.config.patch_embedding_kind == "image_feature0":
            return features
        patches = F.pad(patches, (0, 0, 0, self.most - patches.shape[-2]))
        return self.build_pointing_embedding(patches.flatten(-2))

    def of_patch(self, patch: torch.Tensor, slot: torch.Tensor) -> torch.Tensor | None:
        """[..., d] for selected patches: their features [..., P] and places in the token, int64 [...]."""
        if self.config.embed_selected_vit_patch is None:
            return None
        embedded = self.build_vit_embedding(patch)
        return embedded + self.vit_pos_embed(slot) if self.config.embed_selected_vit_patch == "linear_with_pos" else embedded

    def of_cell(self, cell: torch.Tensor) -> torch.Tensor | None:
        """[..., d] for cells int64 [...]."""
        return self.loc_pos_embed(cell) if self.config.embed_location and self.config.cells else None
