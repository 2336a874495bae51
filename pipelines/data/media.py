"""Where media come from: local paths, URLs, any fsspec filesystem, data URLs, bytes. And their sizes, from headers alone."""

from __future__ import annotations

import base64
import binascii
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import fsspec

from pipelines.data.sources import Rejected

TIMEOUT_S = 20.0
ATTEMPTS = 3
MAX_BYTES = 4 << 30
_USER_AGENT = "molmo-pipelines"


def fetch(reference: str | bytes) -> str | bytes:
    """What a decoder takes: an existing local path, or the bytes of everything else.

    Raises:
        Rejected: missing, empty, a folder, or unreadable.
    """
    if isinstance(reference, bytes):
        return _not_empty(reference, "media bytes")
    if reference.startswith("data:"):
        return _not_empty(_data_url(reference), "data URL")
    if reference.startswith(("http://", "https://")):
        return _not_empty(_http(reference), reference)
    if "://" in reference and not reference.startswith("file://"):
        try:
            with fsspec.open(reference, "rb") as file:
                return _not_empty(file.read(), reference)
        except FileNotFoundError:
            raise Rejected("media: missing file", reference) from None
        except (OSError, ImportError, ValueError) as error:
            raise Rejected("media: unreadable URL", f"{reference}: {error}") from None
    path = Path(reference.removeprefix("file://"))
    try:
        if path.is_dir():
            raise Rejected("media: a folder, not a file", str(path))
        size = path.stat().st_size
    except FileNotFoundError:
        raise Rejected("media: missing file", str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise Rejected("media: unreadable file", f"{path!r}: {error}") from None
    if size == 0:
        raise Rejected("media: empty file", str(path))
    return str(path)


def _not_empty(data: bytes, name: str) -> bytes:
    if not data:
        raise Rejected("media: empty file", name)
    return data


def _data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise Rejected("media: unreadable URL", f"{url[:60]}: no data in it")
    try:
        return base64.b64decode(body, validate=True) if header.endswith(";base64") else urllib.parse.unquote_to_bytes(body)
    except binascii.Error as error:
        raise Rejected("media: unreadable URL", f"{url[:60]}...: {error}") from None


def _http(url: str) -> bytes:
    """The body of a URL; what may pass (time-outs, 5xx, 429) is tried again."""
    error: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.5 * 2**attempt)
        try:
            request = urllib.request.Request(url, headers={"User-Agent": _USER_AGENT})
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                data = response.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise Rejected("media: too large", f"{url}: more than {MAX_BYTES:,} bytes")
            return data
        except urllib.error.HTTPError as e:
            error = e
            if e.code < 500 and e.code != 429:
                break
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as e:
            error = e
            if isinstance(e, ValueError) or isinstance(getattr(e, "reason", None), ConnectionRefusedError):
                break
    raise Rejected("media: unreadable URL", f"{url}: {error}")
