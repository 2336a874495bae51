"""Opening videos: one small interface, two decoders; what one of them cannot open or decode, the other tries.

decord is the default. In the containers of `DECORD_CONTAINERS` it gives the same frames at the same times as decoding from
the start does; in others (MPEG program and transport streams, ASF, Ogg) it seeks to wrong frames, reports broken times or
fails, it has no AV1 decoder, and frames turned by 90 degrees come out only if their rows happen to be aligned. Those go to
PyAV, which is slower to open because it reads the packet index of the whole file. Some narrow frames (16, 24, 48 or 72 pixels wide) decord
opens and then fails to copy: PyAV decodes them.

A reader belongs to one process: open it after a fork, and close it (decord keeps about 6 MB of a reader that lingers).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from molmo_core.preprocessing.media import MAX_PIXELS, MediaError, TooManyPixels
from molmo_core.preprocessing.video_containers import AVI, FLV, FORMATS, MATROSKA, MP4, REAL, first_line, read_header

VideoBackend = Literal["auto", "decord", "pyav"]
VideoSource = str | os.PathLike[str] | bytes

DECORD_CONTAINERS = frozenset({MP4, MATROSKA, AVI, FLV, REAL})
_DECORD_UNKNOWN_CODECS = frozenset({"av1", "libdav1d"})


class VideoReader(Protocol):
    """An open video."""

    timestamps: np.ndarray
    """float64 [frames]: when each frame is shown, seconds after the first one; increasing."""
    fps: float
    """Average rate, frames a second."""

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        """Decodes frames.

        Args:
            indices: ascending, without repetition.

        Returns:
            uint8 [frames, height, width, 3], RGB, upright (rotation metadata applied); a copy.

        Raises:
            MediaError: a frame cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Frees the decoder."""
        ...


def open_video(source: VideoSource, backend: VideoBackend = "auto", max_pixels: int = MAX_PIXELS) -> VideoReader:
    """Opens a video and reads its index; no frame is decoded.

    Args:
        source: a path, or the bytes of a file.
        backend: `auto` is decord where it is exact and installed, and PyAV for everything else and for what decord fails at.
        max_pixels: a video with larger frames is refused.

    Raises:
        TooManyPixels: frames larger than `max_pixels`.
        MediaError: missing, empty, truncated, no video, no frames, or times that make no sense.
    """
    name = str(source) if not isinstance(source, bytes) else f"video of {len(source):,} bytes"
    with _stream(source, name) as stream:
        header = read_header(stream, name)
    if header.height * header.width > max_pixels:
        raise TooManyPixels(f"{name}: frames of {header.width} x {header.height} pixels, more than the limit of {max_pixels:,}")
    exact = header.container in DECORD_CONTAINERS and header.codec not in _DECORD_UNKNOWN_CODECS and not header.turned
    if backend == "decord" and not exact:
        what = f"{'rotated ' if header.turned else ''}{header.codec} in {header.container}"
        raise MediaError(f"{name}: decord does not read {what} reliably; use the pyav backend, or convert it to upright MP4")
    if backend == "decord":
        return DecordReader(source, name)
    if backend == "auto" and exact and _has_decord():
        return EitherReader(source, name)
    return PyAVReader(source, name)


class EitherReader:
    """decord, and PyAV from the first failure on (see `VideoReader`)."""

    def __init__(self, source: VideoSource, name: str):
        self.name = name
        self._source = source
        self._failure: MediaError | None = None
        try:
            self.reader: VideoReader = DecordReader(source, name)
        except MediaError as failure:
            self._take_pyav(failure)
        self.timestamps, self.fps = self.reader.timestamps, self.reader.fps

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        if self._failure is None:
            try:
                return self.reader.get_batch(indices)
            except MediaError as failure:
                self.reader.close()
                self._take_pyav(failure)
                if len(self.reader.timestamps) != len(self.timestamps):
                    counts = f"decord counts {len(self.timestamps)} frames, PyAV {len(self.reader.timestamps)}"
                    raise MediaError(f"{failure}; {counts}") from failure
        try:
            return self.reader.get_batch(indices)
        except MediaError as error:
            raise self._both(error) from error

    def close(self) -> None:
        self.reader.close()

    def _take_pyav(self, failure: MediaError) -> None:
        self._failure = failure
        try:
            self.reader = PyAVReader(self._source, self.name)
        except MediaError as error:
            raise self._both(error) from error

    def _both(self, error: MediaError) -> MediaError:
        return MediaError(f"{self._failure}; {str(error).removeprefix(f'{self.name}: ')}")


class DecordReader:
    """decord (see `VideoReader`)."""

    def __init__(self, source: VideoSource, name: str):
        import decord

        self.name = name
        decord.logging.set_level(decord.logging.QUIET)
        try:
            self._reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else str(source), num_threads=1)
            times = self._reader.get_frame_timestamp(np.arange(len(self._reader)))[:, 0].astype(np.float64)
        except Exception as error:  # decord's errors share no other base
            raise MediaError(f"{name}: decord cannot open it: {first_line(error)}") from error
        self.timestamps = _checked_times(times, name)
        self.fps = _checked_fps(float(self._reader.get_avg_fps()), self.timestamps)

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        try:
            return self._reader.get_batch(list(map(int, indices))).asnumpy()
        except Exception as error:  # as above
            raise MediaError(f"{self.name}: decord cannot decode it: {first_line(error)}") from error

    def close(self) -> None:
        self._reader = None


class PyAVReader:
    """PyAV (see `VideoReader`)."""

    def __init__(self, source: VideoSource, name: str):
        import av

        self.name = name
        self._source = source
        try:
            self._restart()
            packets = [p for p in self._container.demux(self._stream) if p.pts is not None and p.size > 0]
            self.close()
            self._restart()
        except (av.FFmpegError, IndexError, OSError, ValueError) as error:
            raise MediaError(f"{name}: PyAV cannot open it: {first_line(error)}") from error
        self._pts = np.unique(np.array([p.pts for p in packets if not p.is_discard], np.int64))
        self._keyframes = np.unique(np.array([p.pts for p in packets if p.is_keyframe], np.int64))
        self._can_seek = len(self._keyframes) > 1
        self.timestamps = _checked_times(self._pts * float(self._stream.time_base or 0), name)
        self.fps = _checked_fps(float(self._stream.average_rate or 0), self.timestamps)

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        frames = [self._frame(int(i)) for i in indices]
        if len({f.shape for f in frames}) > 1:
            raise MediaError(f"{self.name}: the size of its frames changes from {frames[0].shape[:2]} on; re-encode it")
        return np.stack(frames)

    def close(self) -> None:
        self._decoding: Iterator[Any] = iter(())
        self._container.close()

    def _frame(self, index: int) -> np.ndarray:
        """Decodes on to a frame, from the last keyframe before it if that is nearer."""
        import av

        target = int(self._pts[index])
        behind = self._position is not None and target <= self._position
        keyframe = int(self._keyframes[max(int(np.searchsorted(self._keyframes, target, side="right")) - 1, 0)]) if self._can_seek else 0
        if self._can_seek and (behind or keyframe > (self._keyframes[0] if self._position is None else self._position)):
            try:
                self._seek(keyframe)
                frame = self._decode_to(target)
            except (av.FFmpegError, OSError):
                frame = None
            if frame is not None:
                return frame
            self._can_seek = False  # some containers have no usable index: from here on decode in order
            behind = True
        try:
            if behind:
                self.close()
                self._restart()
            frame = self._decode_to(target)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"{self.name}: PyAV cannot decode it at {self.timestamps[index]:.3f} s: {first_line(error)}") from error
        if frame is None:
            raise MediaError(f"{self.name}: damaged at {self.timestamps[index]:.3f} s: PyAV gives no frame")
        return frame

    def _restart(self) -> None:
        import av

        self._container: Any = av.open(io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source), options=FORMATS)
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        self._decode()

    def _seek(self, pts: int) -> None:
        self._container.seek(pts, stream=self._stream)
        self._decode()

    def _decode(self) -> None:
        """Starts decoding from where the container stands. Empty packets, which repeat a frame, upset the decoders."""
        self._position: int | None = None  # pts of the frame decoded last
        packets = self._container.demux(self._stream)
        self._decoding = (frame for p in packets if p.size > 0 or p.pts is None for frame in p.decode())

    def _decode_to(self, target: int) -> np.ndarray | None:
        """Decodes up to a frame; None if it does not come."""
        for frame in self._decoding:
            if frame.pts is None:
                continue
            self._position = frame.pts
            if frame.pts == target:
                pixels = frame.to_ndarray(format="rgb24")
                return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
            if frame.pts > target:
                return None
        return None


def _has_decord() -> bool:
    try:
        import decord  # noqa: F401
    except ImportError:  # it has no wheel for this platform
        return False
    return True


def _stream(source: VideoSource, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        if not source:
            raise MediaError(f"{name}: empty file")
        return io.BytesIO(source)
    path = Path(source)
    if not path.is_file():
        raise MediaError(f"{name}: {'a folder, not a video file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise MediaError(f"{name}: empty file")
    return path.open("rb")


def _checked_times(times: np.ndarray, name: str) -> np.ndarray:
    """Times counted from the first frame, if they can be true."""
    if len(times) == 0:
        raise MediaError(f"{name}: no frames")
    if not np.isfinite(times).all() or (np.diff(times) < 0).any() or abs(times[-1] - times[0]) > 1e7:
        raise MediaError(f"{name}: the times of its frames are not in order; convert it, for example to MP4")
    if times[0] < 0:
        raise MediaError(
            f"{name}: its first frame is before the start ({times[0]:.3f} s), as cutting without re-encoding leaves it; re-encode it"
        )
    return times - times[0]


def _checked_fps(rate: float, times: np.ndarray) -> float:
    """The rate of the header if the frames' times bear it out, else the one they have."""
    measured = (len(times) - 1) / times[-1] if times[-1] > 0 else rate
    return rate if rate > 0 and abs(rate - measured) <= 0.05 * measured else round(float(measured), 3)
