"""Images of requests: every kind Pillow writes is read, everything else is refused with the reason."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.serving.errors import ApiError
from pipelines.serving.media import decode_image

LIMIT = 10_000


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(url: str, limit: int = LIMIT) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decode_image(url, limit, "messages[0].content[1]")
    assert caught.value.param == "messages[0].content[1]"
    return caught.value


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp"])
def test_formats(kind):
    image = decode_image(data_url(encoded(Image.new("RGB", (20, 10), (200, 30, 40)), kind), f"image/{kind}"), LIMIT, "x")
    assert (image.shape, image.dtype) == ((10, 20, 3), np.uint8)
    assert np.abs(image.astype(int) - (200, 30, 40)).max() <= 8


def test_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode_image(data_url(encoded(Image.new("RGB", (20, 10)), "jpeg", exif=exif)), LIMIT, "x").shape == (20, 10, 3)


def test_parameters_and_line_breaks_in_the_url():
    data = base64.encodebytes(encoded(Image.new("RGB", (64, 64)))).decode()
    assert decode_image(f"data:image/png;charset=utf-8;base64,{data}", LIMIT, "x").shape == (64, 64, 3)


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "https://example.com/a.png", "HTTP://localhost/"])
def test_no_address_is_fetched(url):
    error = refusal(url)
    assert (error.status, error.code) == (400, "url_not_supported")
    assert "fetches no addresses" in error.message


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "", "data:image/png,abc", "data:text/html;base64,PGI+"])
def test_other_urls(url):
    error = refusal(url)
    assert (error.status, error.code) == (400, "invalid_image_url")


def test_bad_base64():
    assert refusal("data:image/png;base64,@@@@").code == "invalid_base64"
    assert refusal("data:image/png;base64,abc").code == "invalid_base64"


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_not_an_image(data):
    assert refusal(data_url(data)).code == "invalid_image"


def test_truncated():
    whole = encoded(Image.effect_noise((80, 80), 50).convert("RGB"))
    error = refusal(data_url(whole[: len(whole) // 2]))
    assert error.code == "invalid_image"
    assert "truncated" in error.message


@pytest.mark.parametrize("side", [101, 9_000, 60_000])
def test_pixel_limit_is_checked_before_decoding(side):
    """A file of a few bytes that claims to be huge (decompression bomb)."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    error = refusal(data_url(bomb))
    assert error.code == "invalid_image"
    assert "limit" in error.message
