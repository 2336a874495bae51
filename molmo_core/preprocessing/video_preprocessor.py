"""VideoOlmo's inputs: sampled frames, each one crop, with the time written between them or in front.

Source: the published VideoOlmo research code. A frame is `<im_start> (patch·w <im_col>)·h <im_end>`; its patch token is `<im_low>`, or
`<im_patch>` for every N-th frame where `periodic_high_res_frame` = N, which is then pooled by `high_res_pooling_*`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from molmo_core.preprocessing.configs import VideoPreprocessorConfig
from molmo_core.preprocessing.image_tokens import grid_tokens
from molmo_core.preprocessing.images import ImageSettings
from molmo_core.preprocessing.messages import MediaTokens
from molmo_core.preprocessing.point_places import PointPlaces
from molmo_core.preprocessing.preprocessor import MolmoPreprocessor, example_images
from molmo_core.preprocessing.tiling import Grid, pooled_grid
from molmo_core.preprocessing.videos import FrameSettings, VideoFeatures, frame_pooling, load_frames, preprocess_video, sample_times


@dataclasses.dataclass
class VideoPreprocessor(MolmoPreprocessor):
    """What the preprocessors of video models share. Subclasses say which tokens stand for a video (`video_inputs`)."""

    def video_example(self, example: dict[str, Any], rng: np.random.RandomState) -> dict[str, Any]:
        """Preprocesses an example with `video` (path, bytes, or the `VideoFeatures` that `preprocess_video` made of it with `settings` and
        `frame_settings`; `clip_start`, `clip_end` in seconds, if only a part is meant).

        Raises:
            ValueError: images beside the video, a record or length that does not fit (`MediaError` for the video itself).
        """
        if self.settings is None:
            raise ValueError("the example has a video, but the model has no vision_backbone")
        if example_images(example):
            raise ValueError("an example has either a video or images, not both")
        sampling = self.frame_settings
        clip = example.get("clip_start"), example.get("clip_end")
        # Two draws from one seed: the frames for pictures must be those of the patches.
        seed = rng.randint(2**31) if self.is_training and sampling.mode == "random" else None
        draw = None if seed is None else np.random.RandomState(seed)
        features = example["video"]
        if not isinstance(features, VideoFeatures):
            features = preprocess_video(features, self.settings, sampling, *clip, rng=draw)
        annotations = self.annotations(example, rng, places=self.frame_places(features.times))
        media, arrays = self.video_inputs(features, example)
        result = self.assemble(example, annotations, [media], arrays)
        result["metadata"] |= {"frame_times": features.times.tolist(), "video_size": features.size}
        if self.include_image:
            draw = None if seed is None else np.random.RandomState(seed)
            result["metadata"]["image_arrays"] = list(load_frames(example["video"], sampling, *clip, rng=draw).pixels)
        return result

    @property
    def frame_settings(self) -> FrameSettings:
        """Which frames of a video are taken."""
        return FrameSettings.from_config(self.config)

    def measure_video(
        self, example: dict[str, Any], timestamps: np.ndarray, fps: float, rng: np.random.RandomState | None = None
    ) -> tuple[int, int]:
        """Tokens and frames that preprocessing the example with the same `rng` gives, from the times of its video's frames alone.

        Args:
            timestamps: float64 [frames], seconds, of the whole video.
            fps: its average rate.

        Raises:
            ValueError: as preprocessing; `adaptive` sampling.
        """
        rng = np.random.RandomState(0) if rng is None else rng
        sampling = self.frame_settings
        random = self.is_training and sampling.mode == "random"
        draw = np.random.RandomState(rng.randint(2**31)) if random else None
        sample = sample_times(timestamps, fps, sampling, example.get("clip_start"), example.get("clip_end"), draw)
        features = VideoFeatures(np.empty((len(sample.times), 0, 0), np.uint8), None, sample.times, sample.sampling_fps, (0, 0))
        annotations = self.annotations(example, rng, places=self.frame_places(features.times))
        media, _ = self.video_inputs(features, example)
        return len(self.assemble(example, annotations, [media], {})["input_ids"]), len(sample.times)

    def frame_places(self, times: np.ndarray) -> PointPlaces | None:
        """What can be pointed at in frames of these times, for models whose points are no text."""
        return None

    def video_inputs(self, features: VideoFeatures, example: dict[str, Any]) -> tuple[MediaTokens, dict[str, np.ndarray | None]]:
        """Tokens of the video and its arrays."""
        raise TypeError(f"{type(self).__name__} does not define video_inputs")


@dataclasses.dataclass
class VideoOlmoPreprocessor(VideoPreprocessor):
    """One video, or text alone."""

    config: VideoPreprocessorConfig = dataclasses.field(default_factory=VideoPreprocessorConfig)

    def __call__(self, example: dict[str, Any], rng: np.random.RandomState | None = None) -> dict[str, Any]:
        """Preprocesses one example.

        Args:
            example: `video` (path or bytes), if any, `clip_start`, `clip_end` (seconds), and a record (see `data_formatter`).
            rng: randomness of prompts, trees and `random` frames; None = always the same draws.

        Returns:
            the text arrays of `MolmoPreprocessor`; `images` uint8 [T, patches, p·p·3] and, for encoders that pad, `image_masks`
            [T, patches]; `low_res_pooled_idx` int64 [n, k] and, with `periodic_high_res_frame`, `high_res_pooled_idx`; in the metadata
            `frame_times` [T], seconds.
        """
        rng = np.random.RandomState(0) if rng is None else rng
        if example.get("video") is not None:
            return self.video_example(example, rng)
        if example_images(example):
            raise ValueError("VideoOlmo takes a video; for images use Molmo or Molmo2")
        return super().__call__(example, rng)

    def video_inputs(self, features: VideoFeatures, example: dict[str, Any]) -> tuple[MediaTokens, dict[str, np.ndarray | None]]:
        config, settings, tokenizer = self.config, self.settings, self.tokenizer
        assert settings is not None
        period = config.periodic_high_res_frame
        high_pooling = (config.high_res_pooling_h or config.pooling_h, config.high_res_pooling_w or config.pooling_w)
        frames = range(len(features.times))
        high = [frame for frame in frames if period is not None and frame % period == 0]
        low = [frame for frame in frames if frame not in set(high)]
        low_frame = self._frame(settings, settings.pooling, tokenizer.image_low_token_id)
        high_frame = self._frame(settings, high_pooling, tokenizer.image_patch_token_id)
        parts: list[Any] = [tokenizer.encode(time_prefix(config.time_mode, features))]
        for frame, time in zip(frames, features.times):
            if config.time_mode == "per-frame":
                parts.append(tokenizer.encode(f"{' ' if frame else ''}time {time:.2f} "))
            parts.append(high_frame if frame in set(high) else low_frame)
        arrays: dict[str, np.ndarray | None] = {"images": features.images, "image_masks": features.image_masks}
        if low:
            arrays["low_res_pooled_idx"] = frame_pooling(low, settings)
        if high:
            arrays["high_res_pooled_idx"] = frame_pooling(high, settings, high_pooling)
        return MediaTokens(np.concatenate(parts).astype(np.int64)), arrays

    def _frame(self, settings: ImageSettings, pooling: Grid, patch: int) -> np.ndarray:
        tokenizer = self.tokenizer
        col = tokenizer.image_col_token_id if settings.use_col_tokens else None
        return grid_tokens(
            pooled_grid(settings.crop_grid, pooling), patch, tokenizer.image_start_token_id, tokenizer.image_end_token_id, col
        )


def time_prefix(mode: str, features: VideoFeatures) -> str:
    """What precedes the first frame: the rate of the sampled frames, or the seconds between them."""
    times = features.times
    rate = features.sampling_fps
    if rate is None and len(times) > 1 and times[-1] > times[0]:
        rate = (len(times) - 1) / (times[-1] - times[0])
    if rate is None:  # one frame has no rate
        return ""
    if mode == "sampled-fps-prefix":
        return f"FPS {rate:.2f}"
    if mode == "time-delta-prefix":
        return f"Sampling Delta {1 / rate:.2f}"
    return f"FPS {1 / rate:.2f}" if mode == "fps-prefix" else ""  # the published fps-prefix writes the inverse
