"""Media of requests: every kind of file that Pillow and the video readers read is used, everything else is refused with the reason."""

import base64
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.serving.config import ServeConfig
from pipelines.serving.media.features import Limits, Task, Unusable, media_features

LIMITS = Limits(bytes=1 << 20, pixels=10_000, frames=1000, seconds=60)


@pytest.fixture(scope="module")
def settings(golden_config):
    return golden_config.build_preprocessor(for_inference=True, is_training=False).image_settings(1)


@pytest.fixture
def features(settings):
    """`features(data)`: of an image, or why there are none."""
    return lambda data, limits=LIMITS, is_base64=False: media_features(Task(data, is_base64, settings, None, limits))


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp"])
def test_formats(features, kind):
    result = features(encoded(Image.new("RGB", (20, 10), (200, 30, 40)), kind))
    assert result.size == (20, 10)
    assert result.images.dtype == np.uint8


def test_rotation(features):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert features(encoded(Image.new("RGB", (20, 10)), "jpeg", exif=exif)).size == (10, 20)


def test_base64(features):
    file = encoded(Image.new("RGB", (64, 64)))
    plain, broken = features(base64.b64encode(file), is_base64=True), features(base64.encodebytes(file), is_base64=True)
    assert plain.size == broken.size == (64, 64), "line breaks are allowed"
    for text in (b"@@@@", b"abc", b"a"):
        assert features(text, is_base64=True).code == "invalid_base64"


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"PK\x03\x04", b"\x1f\x8b\x08" + bytes(40)]
)
def test_not_an_image(features, data):
    assert features(data).code == "invalid_image"


def test_truncated(features):
    whole = encoded(Image.effect_noise((80, 80), 50).convert("RGB"))
    result = features(whole[: len(whole) // 2])
    assert result.code == "invalid_image"
    assert "truncated" in result.message


@pytest.mark.parametrize("side", [101, 9_000, 60_000])
def test_pixels_are_checked_before_decoding(features, side):
    """A file of a few bytes that claims to be huge (decompression bomb)."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    result = features(bomb)
    assert result.code == "invalid_image"
    assert "limit" in result.message


def test_bytes_are_checked(features):
    file = encoded(Image.new("RGB", (64, 64)))
    result = features(file, Limits(len(file) - 1, 10_000, 1, 1))
    assert (result.code, result.message) == ("invalid_image", f"{len(file):,} bytes; this server takes {len(file) - 1:,}")


def test_limits_of_a_server():
    limits = Limits.of(ServeConfig(model="m", max_media_bytes=2000, max_image_pixels=3, max_video_frames=4, max_video_seconds=5))
    assert limits == Limits(2000, 3, 4, 5)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_broken_images(features, kind):
    """Bytes changed and cut off: features or a reason, never an exception."""
    draw = random.Random(0)
    file = encoded(Image.effect_noise((60, 40), 50).convert("RGB"), kind)
    outcomes = set()
    for _ in range(150):
        broken = bytearray(file[: draw.randint(1, len(file))] if draw.random() < 0.3 else file)
        for _ in range(draw.choice([0, 1, 3, 30])):
            broken[draw.randrange(min(len(broken), draw.choice([40, len(broken)])))] = draw.randrange(256)
        result = features(bytes(broken))
        outcomes.add(type(result))
        if isinstance(result, Unusable):
            assert result.code == "invalid_image"
            assert result.message
        else:
            assert result.images.dtype == np.uint8
    assert Unusable in outcomes
