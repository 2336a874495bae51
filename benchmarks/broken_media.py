"""Media that are broken in as many ways as possible, as data URLs: what the fuzzer sends, one after the other."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

MANY = 50_000
"""Pixels of a side that no server takes."""


class BrokenMedia:
    """An endless source of URLs, the same for the same seed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._whole = [*_pictures(), *_videos()]
        self._odd = [*_odd_pictures(), *_not_media()]

    def url(self) -> tuple[str, str]:
        """(`image` or `video`, URL)."""
        rng = self._rng
        kind, mime, data = rng.choice(self._whole)
        match rng.randrange(8):
            case 0:
                data = data[: rng.randrange(len(data))]
            case 1:
                data = _flipped(rng, data)
            case 2:  # bytes are missing, or there twice
                place, length = rng.randrange(len(data)), rng.randrange(1, 400)
                data = (
                    data[:place] + data[place + length :]
                    if rng.random() < 0.5
                    else data[:place] + data[place : place + length] * 2 + data[place:]
                )
            case 3:  # the header of one, the rest of another
                data = data[: rng.randrange(4, 200)] + rng.choice(self._whole)[2]
            case 4:
                kind, mime, data = rng.choice(self._odd)
            case 5:
                kind = "video" if kind == "image" else "image"
            case 6:
                return kind, rng.choice(_URLS)
            case _:
                mime = rng.choice(["image/png", "video/mp4", "text/html", "image/svg+xml", "application/octet-stream", "", "IMAGE/PNG"])
        text = base64.b64encode(data).decode()
        if text and rng.random() < 0.1:
            text = _flipped(rng, text.encode()).decode("latin-1")
        return kind, f"data:{mime};base64,{text}"


_URLS = [
    "",
    "data:",
    "data:,",
    "data:image/png,abc",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png;base64,====",
    "data:;base64,AAAA",
    "http://127.0.0.1/a.png",
    "https://169.254.169.254/latest/meta-data",
    "http://[::1]:8265/",
    "http://0x7f000001/",
    "file:///etc/passwd",
    "/etc/passwd",
    "ftp://example.com/a.png",
    "http://user:password@127.0.0.1/",
    "http://localhost.:8000/",
    "blob:abc",
    "javascript:alert(1)",
    "https://",
    "https:///",
    "http://[",
    "http://\u2024/",
    "data:image/png;base64,\u00e9\u00e9",
    "DATA:IMAGE/PNG;BASE64,AAAA",
    "x" * 20_000,
]


def _flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(height: int = 48, width: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), np.uint8))


def _pictures() -> Iterator[tuple[str, str, bytes]]:
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        yield "image", f"image/{kind}", _saved(_noise(), kind)
    yield "image", "image/jpeg", _saved(_noise(), "jpeg", progressive=True)
    yield "image", "image/png", _saved(_noise().convert("P"), "png")
    yield "image", "image/gif", _saved(_noise(), "gif", save_all=True, append_images=[_noise(seed=1), _noise(seed=2)])


def _videos() -> Iterator[tuple[str, str, bytes]]:
    for container, codec in (("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mjpeg"), ("webm", "libvpx")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=container) as out:
            stream = out.add_stream(codec, rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number in range(8):
                out.mux(stream.encode(av.VideoFrame.from_image(_noise(seed=number))))
            out.mux(stream.encode())
        yield "video", f"video/{'webm' if container == 'webm' else 'mp4'}", buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IEND", b"")


def _odd_pictures() -> Iterator[tuple[str, str, bytes]]:
    """Whole files at the edge of what there is."""
    zeros = zlib.compress(bytes(10_000_000), 9)
    odd = [
        _png(MANY, MANY),
        _png(MANY, MANY, _chunk(b"IDAT", zeros)),
        _png(0, 0),
        _png(0xFFFFFFFF, 1),
        _png(1, 1),
        _png(4000, 3000, _chunk(b"IDAT", zeros)),
        _png(64, 48, _chunk(b"IDAT", zlib.compress(b""))),
        _png(64, 48, _chunk(b"iCCP", b"a\0\0" + zeros)),
        _png(64, 48, _chunk(b"zTXt", b"a\0\0" + zeros)),
        _png(64, 48, depth=3),
        _png(64, 48, colour=7),
        _png(3_000, 1, _chunk(b"IDAT", zlib.compress(bytes(9_001)))),
        _saved(_noise(1, 6_000), "png"),
        _saved(_noise(6_000, 1), "png"),
        _saved(_noise(1, 1), "png"),
        _saved(_noise().convert("L"), "png"),
        _saved(_noise().convert("CMYK"), "jpeg"),
        _saved(_noise().convert("1"), "png"),
        _saved(_noise().convert("LA"), "png"),
        _saved(Image.fromarray(np.random.RandomState(0).randint(0, 65535, (48, 64), np.uint16)), "png"),
        _saved(Image.fromarray(np.random.RandomState(0).rand(48, 64).astype(np.float32)), "tiff"),
        _saved(_noise(), "jpeg", exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" + bytes(500)),
        _saved(_noise(), "jpeg", icc_profile=bytes(3000)),
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
        b"BM" + bytes(60),
        b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(40),
        b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 65535) + bytes(100),
        b"\xff\xd8\xff\xe0" + bytes(1000),
        b"\0\0\1\0\xff\xff" + bytes(100),
    ]
    yield from (("image", "image/png", data) for data in odd)


def _not_media() -> Iterator[tuple[str, str, bytes]]:
    others = [
        b"",
        b"\0",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%PDF-1.4\n",
        b"PK\3\4" + bytes(30),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n",
        b"P6 99999 99999 255\n",
        b"P5 -1 -1 255\n",
        b"SIMPLE  =                    T",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<?xml version='1.0'?><MPD/>",
        b"\x1f\x8b\x08" + bytes(20),
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        bytes(range(256)) * 40,
    ]
    for data in others:
        yield "image", "image/png", data
        yield "video", "video/mp4", data
