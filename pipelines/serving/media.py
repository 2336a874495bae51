"""Images of a request: data URLs only, checked before they are decoded.

No address is ever fetched for a client: a server that does can be made to read its own network (SSRF).
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings

from PIL import Image, ImageOps

from pipelines.serving.errors import ApiError, bad_request

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?,", re.IGNORECASE)


def decode_image(url: str, max_pixels: int, where: str) -> Image.Image:
    """The picture of a data URL, upright, in RGB.

    Args:
        url: `data:image/...;base64,...`.
        max_pixels: width x height allowed; read from the header, before any pixel is decoded.
        where: the field, for error messages.

    Raises:
        ApiError: 400, or 413 where the picture is too large.
    """
    data = _bytes(url, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
            image = Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise bad_request(f"{where}: not an image that can be read ({len(data):,} bytes).", where, "invalid_image") from error
    width, height = image.size
    if width * height > max_pixels:
        message = f"{where}: {width} x {height} pixels; this server takes at most {max_pixels:,} pixels an image."
        raise ApiError(413, message, where, "image_too_large")
    try:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError) as error:
        raise bad_request(f"{where}: the image is damaged: {error}.", where, "invalid_image") from error


def _bytes(url: str, where: str) -> bytes:
    if re.match(r"https?://", url, re.IGNORECASE):
        message = f"{where}: this server fetches no addresses. Send the image itself: data:image/jpeg;base64,..."
        raise bad_request(message, where, "url_not_supported")
    head = _DATA_URL.match(url)
    if not head or not head["base64"]:
        raise bad_request(f"{where}: expected data:image/...;base64,... but found {url[:30]!r}.", where, "invalid_image_url")
    if head["type"] and not head["type"].lower().startswith("image/"):
        raise bad_request(f"{where}: media type {head['type']!r} is not an image.", where, "invalid_image_url")
    try:
        return base64.b64decode(re.sub(r"\s", "", url[head.end() :]), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{where}: the base64 data is invalid ({error}).", where, "invalid_base64") from error


def _rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is shown on white, as a browser does."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
