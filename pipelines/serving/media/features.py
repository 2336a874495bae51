"""From the bytes of a picture or a video to what the vision backbone takes. Runs in a process of its own (`pool`)."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
from typing import NamedTuple

from molmo_core.preprocessing.images import ImageFeatures, ImageSettings, preprocess_image
from molmo_core.preprocessing.media import MediaError, load_image
from molmo_core.preprocessing.video_containers import read_header
from molmo_core.preprocessing.videos import FrameSettings, VideoFeatures, preprocess_video
from pipelines.serving.config import ServeConfig

Features = ImageFeatures | VideoFeatures


class Unusable(NamedTuple):
    """A medium that cannot be used."""

    code: str
    """Of the API's error: `invalid_base64`, `invalid_image`, `invalid_video`."""
    message: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large a medium may be; checked before it is decoded."""

    bytes: int
    """Of the file."""
    pixels: int
    """Of an image, or of a frame of a video."""
    frames: int
    """Of a video."""
    seconds: float
    """Of a video."""

    @classmethod
    def of(cls, config: ServeConfig) -> Limits:
        """Those of a server."""
        return cls(config.max_media_bytes, config.max_image_pixels, config.max_video_frames, config.max_video_seconds)


@dataclasses.dataclass(frozen=True)
class Task:
    """A medium to prepare.

    Attributes:
        data: the file.
        is_base64: `data` are its base64 text.
        settings: how an image or a frame is cut.
        frames: which frames are taken; None = it is an image.
    """

    data: bytes
    is_base64: bool
    settings: ImageSettings
    frames: FrameSettings | None
    limits: Limits


def media_features(task: Task) -> Features | Unusable:
    """Checks, decodes and preprocesses a medium."""
    limits, code = task.limits, "invalid_image" if task.frames is None else "invalid_video"
    try:
        data = decode_base64(task.data) if task.is_base64 else task.data
    except ValueError as error:
        return Unusable("invalid_base64", f"the base64 data is invalid ({error})")
    if len(data) > limits.bytes:
        return Unusable(code, f"{len(data):,} bytes; this server takes {limits.bytes:,}")
    try:
        if task.frames is None:
            return preprocess_image(load_image(data, limits.pixels), task.settings)
        check_video(data, limits)
        return preprocess_video(data, task.settings, dataclasses.replace(task.frames, max_pixels=limits.pixels))
    except MediaError as error:
        return Unusable(code, str(error))
    except MemoryError:
        return Unusable(code, "it takes too much memory to decode")


def decode_base64(text: bytes) -> bytes:
    """The bytes behind base64 text, which may hold line breaks; raises ValueError."""
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def check_video(data: bytes, limits: Limits) -> None:
    """Raises MediaError for a video that is longer than allowed, by its header."""
    name = f"video of {len(data):,} bytes"
    if not data:
        raise MediaError(f"{name}: empty file")
    header = read_header(io.BytesIO(data), name)
    if header.seconds > limits.seconds:
        raise MediaError(f"{name}: {header.seconds:,.1f} s long; this server takes {limits.seconds:,g} s")
    if header.frames > limits.frames:
        raise MediaError(f"{name}: {header.frames:,} frames; this server takes {limits.frames:,}")
