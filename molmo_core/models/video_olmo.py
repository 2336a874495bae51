"""VideoOlmo: a video's frames in, text out. Molmo with two resolutions of frames, each with its own patch token and index."""

from __future__ import annotations

from typing import ClassVar

import torch

from molmo_core.inputs import Inputs
from molmo_core.model_configs.video_olmo import VideoOlmoConfig
from molmo_core.models.image_features import FeatureTarget, share_low_embedding
from molmo_core.models.molmo import Molmo
from molmo_core.preprocessing.index_of_tokens import frame_idx


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
            ids, settings = inputs.input_ids, self.config.image_settings()
            both = frame_idx(ids.cpu().numpy(), crops, self.config.image_tokens, settings, self.config.high_res_pooling())
            low, high = (torch.from_numpy(idx).to(ids.device) for idx in both)
        tokens = self.config.image_tokens
        pairs = ((low, tokens.low), (high, tokens.patch))
        return [FeatureTarget(idx, token_id=token) for idx, token in pairs if idx is not None]
