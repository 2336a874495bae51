"""What a video file says of itself before anything is decoded: container, codec, size, whether it is complete."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from molmo_core.preprocessing.media import MediaError

MP4, MATROSKA, AVI, FLV, REAL = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv", "rm"
FORMATS = {"format_whitelist": ",".join([MP4, MATROSKA, AVI, FLV, REAL, "mpeg,mpegts,mpegvideo,asf,ogg,gif,swf,dv,mxf,h264,hevc,m4v,ivf"])}
"""Options with which libavformat opens containers only. Playlists (HLS, concat, DASH, SDP) name other files and addresses, which it would
read for whoever sent them."""
_DECORD_PREFIX = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")


class VideoHeader(NamedTuple):
    """What the header of a video file says."""

    container: str
    codec: str
    height: int
    width: int
    turned: bool
    """The frames are shown rotated by a quarter turn (phone videos)."""
    seconds: float
    """Its length; 0 = the header does not say."""
    frames: int
    """How many there are, or would be at the average rate; 0 = the header does not say."""


def read_header(stream: BinaryIO, name: str) -> VideoHeader:
    """Reads the header of an open file.

    Args:
        stream: seekable.
        name: for errors.

    Raises:
        MediaError: not a video, no video in it, or less of the file than the header says.
    """
    import av

    try:
        with av.open(stream, "r", options=FORMATS) as container:
            if not container.streams.video:
                raise MediaError(f"{name}: no video in it (container {container.format.name})")
            video = container.streams.video[0]
            kind, codec, height, width = container.format.name, video.codec_context.name, video.height, video.width
            length = video.duration * video.time_base if video.duration and video.time_base else 0
            seconds = max(float(length), (container.duration or 0) / av.time_base)
            frames = video.frames or int(seconds * float(video.average_rate or 0))
    except av.ArgumentError:  # what libavformat says of a format that is not on the list
        raise MediaError(f"{name}: not a video in a container that is read here (MP4, Matroska, WebM, AVI, MPEG, ...)") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{name}: not a video: {first_line(error)}") from error
    _check_complete(stream, kind, name)
    return VideoHeader(kind, codec, height, width, kind == MP4 and _turned(stream), seconds, frames)


def first_line(error: Exception) -> str:
    """An error of a media library in one line, without the time and the source line that decord puts in front: the same file gives the
    same text."""
    text = _DECORD_PREFIX.sub("", str(error).strip())
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _check_complete(stream: BinaryIO, container: str, name: str) -> None:
    """Raises if a container says that it is longer than the file: a broken download, of which decoders silently drop the end."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    end = 0
    if container == MP4:
        end = max((end for _, _, end in _mp4_boxes(stream, size)), default=0)
    elif container == AVI:
        end = struct.unpack("<4xI", stream.read(8))[0] + 8
    elif container == MATROSKA:
        end = _matroska_end(stream)
    if end > size:
        raise MediaError(f"{name}: truncated: {size:,} bytes of at least {end:,}")


def _mp4_boxes(stream: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start of the content and end of every top-level box."""
    position = 0
    while position + 8 <= size:  # 4 bytes size, 4 bytes kind; size 1: 8 more bytes of size, size 0: to the end of the file
        stream.seek(position)
        length, kind = struct.unpack(">I4s", stream.read(8))
        if length == 1:
            length = int.from_bytes(stream.read(8))
        if length < 8:
            return
        yield kind, stream.tell(), position + length
        position += length


def _turned(stream: BinaryIO) -> bool:
    """Whether a matrix in a track header of an MP4 file swaps the axes."""
    size = stream.seek(0, os.SEEK_END)
    for kind, start, end in _mp4_boxes(stream, size):
        if kind == b"moov":
            stream.seek(start)
            movie = stream.read(end - start)
            at = movie.find(b"tkhd")
            while at >= 0:
                matrix = at + (56 if movie[at + 4] else 44)  # behind kind, version, times, id, duration, layer and volume
                if any(movie[matrix + 4 : matrix + 8]):  # how much x contributes to y
                    return True
                at = movie.find(b"tkhd", at + 4)
    return False


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
