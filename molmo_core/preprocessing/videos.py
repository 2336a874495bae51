"""From a video file to the patches of its sampled frames: only those frames are decoded, and a few at a time.

`preprocess_video(path, settings, sampling)` is what training and serving use; `sample_video` says beforehand which frames
that will be, `load_frames` gives them as pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from molmo_core.preprocessing.configs import FrameSampling
from molmo_core.preprocessing.frame_sampling import CANDIDATE_FPS, FrameSample, sample_frames
from molmo_core.preprocessing.images import ImageSettings, preprocess_image
from molmo_core.preprocessing.media import MAX_PIXELS, MediaError
from molmo_core.preprocessing.tiling import Grid, single_crop_pooling
from molmo_core.preprocessing.video_readers import VideoBackend, VideoReader, VideoSource, open_video

__all__ = [
    "FrameSettings",
    "Frames",
    "VideoFeatures",
    "VideoReader",
    "frame_pooling",
    "load_frames",
    "open_video",
    "preprocess_video",
    "sample_times",
    "sample_video",
]

_CHUNK_PIXELS = 32 << 20  # decoded at a time: about 100 MB
_CHANGE_SIZE = 32  # `adaptive` compares frames shrunk to 32 x 32 grey pixels
_EPSILON = 1e-4  # seconds; times in files are rounded


@dataclasses.dataclass(frozen=True)
class FrameSettings:
    """Which frames are taken, and how they are read."""

    mode: FrameSampling = "uniform"
    max_frames: int = 16
    max_fps: float = 2.0
    candidate_fps: tuple[float, ...] = CANDIDATE_FPS
    backend: VideoBackend = "auto"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.max_frames < 1 or self.max_fps <= 0 or min(self.candidate_fps, default=0) <= 0:
            rates = f"candidate_sampling_fps={list(self.candidate_fps)}"
            raise ValueError(f"max_frames={self.max_frames}, max_fps={self.max_fps}, {rates}: all must be positive, the rates at least one")

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> FrameSettings:
        """From a `VideoPreprocessorConfig` or `Molmo2PreprocessorConfig`; `changes` override."""
        values = {"mode": config.frame_sample_mode, "max_frames": config.max_frames, "max_fps": config.max_fps}
        if hasattr(config, "candidate_sampling_fps"):
            values["candidate_fps"] = tuple(config.candidate_sampling_fps)
        return cls(**{**values, **changes})


@dataclasses.dataclass
class Frames:
    """Sampled frames as pictures."""

    pixels: np.ndarray
    """uint8 [T, height, width, 3]."""
    times: np.ndarray
    """float64 [T], seconds since the start of the clip."""
    sampling_fps: float | None
    """See `FrameSample`."""


@dataclasses.dataclass
class VideoFeatures:
    """Sampled frames as the vision backbone takes them: every frame is one crop."""

    images: np.ndarray
    """uint8 [T, patches, p·p·3]."""
    image_masks: np.ndarray | None
    """float32 [T, patches]; None for encoders that do not pad."""
    times: np.ndarray
    """float64 [T], seconds since the start of the clip."""
    sampling_fps: float | None
    """See `FrameSample`."""
    size: tuple[int, int]
    """Width and height of the frames, pixels."""


def sample_video(
    source: VideoSource,
    sampling: FrameSettings,
    clip_start: float | None = None,
    clip_end: float | None = None,
    rng: np.random.RandomState | None = None,
) -> FrameSample:
    """The frames that `preprocess_video` will take. Only `adaptive` has to decode for it.

    Returns:
        `indices` into the whole video, `times` since the start of the clip.
    """
    with _opened(source, sampling) as reader:
        return _sample(reader, sampling, clip_start, clip_end, rng)


def sample_times(
    timestamps: np.ndarray,
    fps: float,
    sampling: FrameSettings,
    clip_start: float | None = None,
    clip_end: float | None = None,
    rng: np.random.RandomState | None = None,
) -> FrameSample:
    """What `sample_video` gives for a video of which only the times of the frames are known.

    Raises:
        ValueError: `adaptive` sampling, which has to decode.
    """
    if sampling.mode == "adaptive":
        raise ValueError("adaptive sampling chooses frames by their pixels: lengths are not known beforehand; prepare the data first")
    return _sample(_Times(timestamps, fps), sampling, clip_start, clip_end, rng)


def preprocess_video(
    source: VideoSource,
    settings: ImageSettings,
    sampling: FrameSettings,
    clip_start: float | None = None,
    clip_end: float | None = None,
    rng: np.random.RandomState | None = None,
) -> VideoFeatures:
    """Samples, decodes, resizes and cuts the frames of a video.

    Args:
        source: a path, or the bytes of a file.
        settings: of the images; each frame becomes one whole crop, whatever its `crop_mode`.
        sampling: which frames.
        clip_start, clip_end: the part of the video that is meant, seconds; None = from its start, to its end.
        rng: for `random` sampling in training; None = the frames of `uniform`.

    Raises:
        MediaError: not a readable video, or the clip is outside of it.
    """
    single = dataclasses.replace(settings, crop_mode="resize")
    images, masks = [], []
    with _opened(source, sampling) as reader:
        sample = _sample(reader, sampling, clip_start, clip_end, rng)
        for frame in _decoded(reader, sample.indices):
            features = preprocess_image(frame, single)
            size = features.size
            images.append(features.images[0])
            if features.image_masks is not None:
                masks.append(features.image_masks[0])
    return VideoFeatures(np.stack(images), np.stack(masks) if masks else None, sample.times, sample.sampling_fps, size)


def load_frames(
    source: VideoSource,
    sampling: FrameSettings,
    clip_start: float | None = None,
    clip_end: float | None = None,
    rng: np.random.RandomState | None = None,
) -> Frames:
    """The sampled frames at full size, for looking at them. Arguments and errors as for `preprocess_video`."""
    with _opened(source, sampling) as reader:
        sample = _sample(reader, sampling, clip_start, clip_end, rng)
        return Frames(np.stack(list(_decoded(reader, sample.indices))), sample.times, sample.sampling_fps)


def frame_pooling(frames: Sequence[int], settings: ImageSettings, pooling: Grid | None = None) -> np.ndarray:
    """Pooled indices of some frames: int64 [frames·tokens, k] into T·patches, frame by frame.

    Molmo2 pools every frame 3 x 3; VideoOlmo pools low- and high-resolution frames differently, into two index tensors.

    Args:
        frames: numbers of the frames among the T sampled ones.
        pooling: rows and columns of patches in a token; None = those of `settings`.
    """
    pool = pooling or settings.pooling
    if not len(frames):
        return np.empty((0, pool[0] * pool[1]), np.int64)
    first = single_crop_pooling(settings, pool)
    moved = first[None] + np.asarray(frames, np.int64)[:, None, None] * settings.patches_per_crop
    return np.where(first[None] >= 0, moved, -1).reshape(-1, first.shape[1])


@dataclasses.dataclass
class _Times:
    """An index without a video."""

    timestamps: np.ndarray
    fps: float

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        raise TypeError("there are no frames behind these times")

    def close(self) -> None:
        """Nothing is open."""


@contextlib.contextmanager
def _opened(source: VideoSource, sampling: FrameSettings) -> Iterator[VideoReader]:
    reader = open_video(source, sampling.backend, sampling.max_pixels)
    try:
        yield reader
    finally:
        reader.close()


def _sample(
    reader: VideoReader, sampling: FrameSettings, clip_start: float | None, clip_end: float | None, rng: np.random.RandomState | None
) -> FrameSample:
    """Samples the frames that are shown during the clip."""
    times = reader.timestamps
    start = clip_start or 0.0
    length = times[-1] + 1 / reader.fps if reader.fps > 0 else times[-1]
    if not 0 <= start < (length if clip_end is None else clip_end) or start > length:
        raise MediaError(f"clip from {start} s to {'the end' if clip_end is None else f'{clip_end} s'} of a video of {length:.3f} s")
    first = max(int(np.searchsorted(times, start + _EPSILON, side="right")) - 1, 0)
    last = len(times) if clip_end is None else max(int(np.searchsorted(times, clip_end - _EPSILON, side="left")), first + 1)
    sample = sample_frames(
        sampling.mode,
        np.maximum(times[first:last] - start, 0.0),
        reader.fps,
        sampling.max_frames,
        max_fps=sampling.max_fps,
        candidate_fps=sampling.candidate_fps,
        rng=rng,
        change=lambda candidates: _change(reader, candidates + first),
    )
    return sample._replace(indices=sample.indices + first)


def _decoded(reader: VideoReader, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Frames uint8 [height, width, 3] in the order of `indices` (ascending, repetitions allowed), each decoded once."""
    unique, counts = np.unique(indices, return_counts=True)
    chunk, done = 1, 0
    while done < len(unique):
        frames = reader.get_batch(unique[done : done + chunk].tolist())
        for frame, count in zip(frames, counts[done:]):
            for _ in range(count):
                yield frame
        done += len(frames)
        chunk = max(_CHUNK_PIXELS // (frames.shape[1] * frames.shape[2]), 1)


def _change(reader: VideoReader, candidates: np.ndarray) -> np.ndarray:
    """How much each frame differs from the one before: mean absolute difference of small grey pictures, float64 [m]."""
    small = []
    for frame in _decoded(reader, candidates):
        grey = cv2.cvtColor(cv2.resize(frame, (_CHANGE_SIZE, _CHANGE_SIZE), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
        small.append(grey.astype(np.float32))
    difference = np.abs(np.diff(np.stack(small), axis=0)).mean(axis=(1, 2))
    return np.concatenate([[0.0], difference]).astype(np.float64)
