"""Images of a request: data URLs only, checked before they are decoded.

No address is ever fetched for a client: a server that does can be made to read its own network (SSRF).
"""

from __future__ import annotations

import base64
import binascii
import re

import numpy as np

from molmo_core.preprocessing.media import MediaError, load_image
from pipelines.serving.errors import bad_request, clipped, shown

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?,", re.IGNORECASE)


def decode_image(url: str, max_pixels: int, where: str) -> np.ndarray:
    """The picture of a data URL, uint8 [height, width, 3], read as the training data is.

    Args:
        url: `data:image/...;base64,...`.
        max_pixels: width x height allowed; checked from the header, before any pixel is decoded.
        where: the field, for error messages.

    Raises:
        ApiError: 400; the message says what is wrong.
    """
    data = _bytes(url, where)
    try:
        return load_image(data, max_pixels)
    except MediaError as error:
        raise bad_request(f"{where}: {clipped(str(error), 300)}.", where, "invalid_image") from error


def _bytes(url: str, where: str) -> bytes:
    if re.match(r"https?://", url, re.IGNORECASE):
        message = f"{where}: this server fetches no addresses. Send the image itself: data:image/jpeg;base64,..."
        raise bad_request(message, where, "url_not_supported")
    head = _DATA_URL.match(url)
    if not head or not head["base64"]:
        raise bad_request(f"{where}: expected data:image/...;base64,... but found {shown(url[:30])}.", where, "invalid_image_url")
    if head["type"] and not head["type"].lower().startswith("image/"):
        raise bad_request(f"{where}: media type {shown(head['type'])} is not an image.", where, "invalid_image_url")
    try:
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{where}: the base64 data is invalid ({error}).", where, "invalid_base64") from error
