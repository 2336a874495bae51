"""Opening videos: one small interface, two decoders.

decord is the default. In the containers of `DECORD_CONTAINERS` it gives the same frames at the same times as decoding from
the start does; in others (MPEG program and transport streams, ASF, Ogg) it seeks to wrong frames, reports broken times or
fails, and it has no AV1 decoder. Those go to PyAV, which is slower to open because it reads the packet index of the whole file.

A reader belongs to one process: open it after a fork, and close it (decord keeps about 6 MB of a reader that lingers).
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from molmo_core.preprocessing.media import MAX_PIXELS, MediaError

VideoBackend = Literal["auto", "decord", "pyav"]
VideoSource = str | os.PathLike[str] | bytes

DECORD_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv", "rm"})
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
        backend: `auto` is decord where it is exact and installed, else PyAV.
        max_pixels: a video with larger frames is refused.

    Raises:
        MediaError: missing, empty, truncated, no video, no frames, or times that make no sense.
    """
    name = str(source) if not isinstance(source, bytes) else f"video of {len(source):,} bytes"
    with _stream(source, name) as stream:
        container, codec, size = _probe(stream, name)
        _check_complete(stream, container, name)
    if size[0] * size[1] > max_pixels:
        raise MediaError(f"{name}: frames of {size[0]} x {size[1]} pixels, more than the limit of {max_pixels:,}")
    exact = container in DECORD_CONTAINERS and codec not in _DECORD_UNKNOWN_CODECS
    if backend == "decord" and not exact:
        raise MediaError(f"{name}: decord does not read {codec} in {container} reliably; use the pyav backend, or convert it to MP4")
    if backend == "decord" or (backend == "auto" and exact and _has_decord()):
        try:
            return DecordReader(source, name)
        except MediaError:
            if backend == "decord":
                raise
    return PyAVReader(source, name)


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
            raise MediaError(f"{name}: decord cannot open it: {_first_line(error)}") from error
        self.fps = float(self._reader.get_avg_fps())
        self.timestamps = _checked_times(times, name)

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        try:
            return self._reader.get_batch(list(map(int, indices))).asnumpy()
        except Exception as error:  # as above
            raise MediaError(f"{self.name}: decord cannot decode frames {list(indices)[:8]}: {_first_line(error)}") from error

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
            raise MediaError(f"{name}: PyAV cannot open it: {_first_line(error)}") from error
        self._pts = np.unique(np.array([p.pts for p in packets if not p.is_discard], np.int64))
        self._keyframes = np.unique(np.array([p.pts for p in packets if p.is_keyframe], np.int64))
        self._can_seek = len(self._keyframes) > 1
        self.timestamps = _checked_times(self._pts * float(self._stream.time_base or 0), name)
        span = self.timestamps[-1]
        self.fps = float(self._stream.average_rate or ((len(self._pts) - 1) / span if span > 0 else 1.0))

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        return np.stack([self._frame(int(i)) for i in indices])

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
            raise MediaError(f"{self.name}: PyAV cannot decode frame {index}: {_first_line(error)}") from error
        if frame is None:
            raise MediaError(f"{self.name}: frame {index} (at {self.timestamps[index]:.3f} s) is damaged: the decoder does not give it")
        return frame

    def _restart(self) -> None:
        import av

        self._container: Any = av.open(io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source))
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


def _probe(stream: BinaryIO, name: str) -> tuple[str, str, tuple[int, int]]:
    """Container and codec names, and width and height of the frames."""
    import av

    try:
        with av.open(stream) as container:
            if not container.streams.video:
                raise MediaError(f"{name}: no video in it (container {container.format.name})")
            video = container.streams.video[0]
            return container.format.name, video.codec_context.name, (video.width, video.height)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{name}: not a video: {_first_line(error)}") from error


def _check_complete(stream: BinaryIO, container: str, name: str) -> None:
    """Raises if a container says that it is longer than the file: a broken download, of which decoders silently drop the end."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    end = 0
    if container.startswith("mov,mp4"):
        while end + 8 <= size:  # top-level boxes: 4 bytes size, 4 bytes kind; size 1: 8 more bytes of size, 0: to the end
            stream.seek(end)
            length = struct.unpack(">I4x", stream.read(8))[0]
            if length == 1:
                length = int.from_bytes(stream.read(8))
            if length < 8:
                break
            end += length
    elif container == "avi":
        end = struct.unpack("<4xI", stream.read(8))[0] + 8
    elif container.startswith("matroska"):
        end = _matroska_end(stream)
    if end > size:
        raise MediaError(f"{name}: truncated: {size:,} bytes of at least {end:,}")


def _matroska_end(stream: BinaryIO) -> int:
    """Where the Segment, which holds everything behind the EBML header, ends; 0 if the file does not say."""

    def size() -> int | None:
        first = stream.read(1)[0]
        extra = 8 - first.bit_length()  # bytes that follow
        value = int.from_bytes(bytes([first & ((1 << (7 - extra)) - 1)]) + stream.read(extra))
        return None if value == (1 << (7 * (extra + 1))) - 1 else value

    stream.seek(4)
    header = size() or 0
    stream.seek(header, os.SEEK_CUR)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = size()
    return 0 if length is None else stream.tell() + length


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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
