"""Molmo2's inputs: text, an image, several images, or a video with or without subtitles.

Source: the published Molmo2 code and its processor. Images are Molmo's with other tokens around them (settings of
`Molmo2PreprocessorConfig`). A video is, frame by frame, its time in seconds and the frame's pooled tokens,

    0.0 <frame_start> <im_patch>·81 <frame_end> 0.5 <frame_start> ..

then the subtitles: `subtitle`, and a line `start - end text` for each that is shown within a second of a sampled frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from molmo_core.preprocessing.configs import Molmo2PreprocessorConfig
from molmo_core.preprocessing.image_tokens import grid_tokens
from molmo_core.preprocessing.messages import MediaTokens
from molmo_core.preprocessing.tiling import pooled_grid
from molmo_core.preprocessing.video_preprocessor import VideoPreprocessor
from molmo_core.preprocessing.videos import VideoFeatures, frame_pooling

SUBTITLE_WINDOW_S = 1.0


@dataclasses.dataclass
class Molmo2Preprocessor(VideoPreprocessor):
    """Text with no, one or several images, or with a video."""

    config: Molmo2PreprocessorConfig = dataclasses.field(default_factory=Molmo2PreprocessorConfig)
    frame_tokens: ClassVar[bool] = False
    """All frames together are between the tokens of a frame, and not those of an image (without `per_frame_special_token`)."""

    def __call__(self, example: dict[str, Any], rng: np.random.RandomState | None = None) -> dict[str, Any]:
        """Preprocesses one example.

        Args:
            example: `image`, `images` or `video` (path or bytes), if any; with a video `clip_start`, `clip_end` (seconds) and
                `subtitle`: [{"start", "end", "text"}], times in seconds of the clip; and a record (see `data_formatter`).
            rng: randomness of prompts, trees, resolution and `random` frames; None = always the same draws.

        Returns:
            the arrays of `MolmoPreprocessor`; a video's frames are `images` uint8 [T, patches, p·p·3] with `pooled_patches_idx` int64
            [n, 9] and `frame_times` [T], seconds, in the metadata.
        """
        rng = np.random.RandomState(0) if rng is None else rng
        if example.get("video") is not None:
            return self.video_example(example, rng)
        if example.get("subtitle"):
            raise ValueError("an example has subtitles but no video")
        return super().__call__(example, rng)

    def video_inputs(self, features: VideoFeatures, example: dict[str, Any]) -> tuple[MediaTokens, dict[str, np.ndarray | None]]:
        config, settings, tokenizer = self.config, self.settings, self.tokenizer
        assert settings is not None
        pooling = (config.video_pooling_h, config.video_pooling_w)
        each = config.per_frame_special_token
        start, end = tokenizer.frame_start_token_id, tokenizer.frame_end_token_id
        whole = (start, end) if self.frame_tokens else (tokenizer.image_start_token_id, tokenizer.image_end_token_id)
        grid = pooled_grid(settings.crop_grid, pooling)
        frame = grid_tokens(grid, tokenizer.image_patch_token_id, start if each else None, end if each else None)
        parts: list[Any] = [] if each else [[whole[0]]]
        for number, time in enumerate(features.times):
            parts += [tokenizer.encode(f"{' ' if number else ''}{time:.1f} "), frame]
        if not each:
            parts.append([whole[1]])
        parts.append(self.subtitle_tokens(example.get("subtitle") or (), features.times))
        return MediaTokens(np.concatenate(parts).astype(np.int64)), {
            "images": features.images,
            "image_masks": features.image_masks,
            "pooled_patches_idx": frame_pooling(range(len(features.times)), settings, pooling),
        }

    def subtitle_tokens(self, subtitles: Sequence[dict[str, Any]], times: np.ndarray) -> list[int]:
        """Tokens of the subtitles that are shown within a second of a sampled frame; at most `max_subtitle_tokens`.

        Args:
            subtitles: {"start", "end", "text"}, seconds.
            times: [T] of the sampled frames.

        Raises:
            ValueError: an entry lacks a field.
        """
        lines = []
        for number, entry in enumerate(subtitles):
            if not {"start", "end", "text"} <= set(entry):
                raise ValueError(f"subtitle {number} needs start, end and text, has {sorted(entry)}")
            start, end = float(entry["start"]), float(entry["end"])
            if ((times >= start - SUBTITLE_WINDOW_S) & (times <= end + SUBTITLE_WINDOW_S)).any():
                lines.append(f"{start:.1f} - {end:.1f} {entry['text']}\n")
        if not lines:
            return []
        return self.tokenizer.encode("subtitle\n" + "".join(lines))[: self.config.max_subtitle_tokens]
