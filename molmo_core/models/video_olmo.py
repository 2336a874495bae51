"""VideoOlmo: a video's frames in, text out. Molmo with two resolutions of frames, each with its own patch token and index."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from molmo_core.inputs import Inputs
from molmo_core.model_configs.video_olmo import VideoOlmoConfig
from molmo_core.models.image_inputs import FeatureTarget
from molmo_core.models.molmo import Molmo
from molmo_core.preprocessing.tiling import single_crop_pooling
from molmo_core.tokens import ImageTokenIds


class VideoOlmo(Molmo):
    """Molmo on video frames.

    `forward` takes what Molmo's does, with `images` the frames, patches [B, T, patches, p·p·3] or pixels [B, T, 3, H, W], and, instead
    of `pooled_patches_idx`, `low_res_pooled_idx` int64 [B, n, k] for the low-resolution tokens and `high_res_pooled_idx` for the others.
    Frames without either index are pooled as their tokens in `input_ids` say.
    """

    config: VideoOlmoConfig
    FEATURES: ClassVar[tuple[str, ...]] = ("low_res_pooled_idx", "high_res_pooled_idx")

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.transformer.wte(share_low_embedding(ids, self.config.image_tokens) if self.config.shared_low_high_embedding else ids)

    def feature_targets(self, inputs: Inputs, crops: int) -> list[FeatureTarget]:
        low, high = (inputs.features.get(name) for name in self.FEATURES)
        if low is None and high is None:
            low, high = self.frame_indices(inputs.input_ids, crops)
        tokens = self.config.image_tokens
        pairs = ((low, tokens.low), (high, tokens.patch))
        return [FeatureTarget(idx, token_id=token) for idx, token in pairs if idx is not None]

    def frame_indices(self, input_ids: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both index tensors, int64 [B, n, k], from the tokens of every frame.

        Raises:
            ValueError: a frame's tokens are no grid that this configuration makes, or there are more frames than `frames`.
        """
        tokens, settings = self.config.image_tokens, self.config.image_settings()
        poolings = {tokens.low: settings.pooling, tokens.patch: self.config.high_res_pooling()}
        parts: dict[int, list[np.ndarray]] = {tokens.low: [], tokens.patch: []}
        for row, ids in enumerate(input_ids.tolist()):
            starts = [i for i, token in enumerate(ids) if token == tokens.start]
            if len(starts) > frames:
                raise ValueError(f"row {row}: input_ids show {len(starts)} frames, images has {frames}")
            found: dict[int, list[np.ndarray]] = {kind: [np.empty((0, p[0] * p[1]), np.int64)] for kind, p in poolings.items()}
            for frame, start in enumerate(starts):
                inside = ids[start : ids.index(tokens.end, start)]
                kind = tokens.low if tokens.low in inside else tokens.patch
                idx = single_crop_pooling(settings, poolings[kind], frame)
                if len(idx) != inside.count(kind):
                    raise ValueError(f"row {row}: frame {frame} has {inside.count(kind)} tokens, this configuration makes {len(idx)}")
                found[kind].append(idx)
            for kind, arrays in found.items():
                parts[kind].append(np.concatenate(arrays))
        return _stack(parts[tokens.low], input_ids.device), _stack(parts[tokens.patch], input_ids.device)


def share_low_embedding(ids: torch.Tensor, tokens: ImageTokenIds) -> torch.Tensor:
    """Token ids with the low-resolution patch token replaced by the patch token."""
    return ids.masked_fill(ids == tokens.low, tokens.patch)


def _stack(rows: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Rows [n_b, k] of a batch, padded with -1: [B, n, k]."""
    result = np.full((len(rows), max(len(r) for r in rows), rows[0].shape[1]), -1, np.int64)
    for row, array in zip(result, rows):
        row[: len(array)] = array
    return torch.from_numpy(result).to(device)
