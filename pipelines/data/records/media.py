"""Where media come from: local paths, URLs, any fsspec filesystem, data URLs, bytes. And their sizes, from headers alone."""

from __future__ import annotations

import base64
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np

from pipelines.data.records.record_file import local_path
from pipelines.data.rejects import Rejected

TIMEOUT_S = 20.0
ATTEMPTS = 3
DEAD_S = 60.0
"""For so long a host is left alone that did not answer any attempt: a thousand rows must not wait for it one after the other."""
MAX_BYTES = 4 << 30
_USER_AGENT = "molmo-pipelines"
_dead: dict[str, tuple[float, str]] = {}
"""Until when (`time.monotonic`) a host is left alone, and why."""


class Media(NamedTuple):
    """What the media of a record measure."""

    image_sizes: list[tuple[int, int]]
    """Height and width of each image."""
    timestamps: np.ndarray | None
    """float64 [frames], seconds, of the video."""
    fps: float | None


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
                data = file.read()
        except FileNotFoundError:
            raise Rejected("media: missing file", reference) from None
        except Exception as error:  # every filesystem has its own: broken archives, refused credentials, packages that are missing
            raise Rejected("media: unreadable URL", f"{reference}: {type(error).__name__}: {error}") from None
        return _not_empty(data, reference)
    path = Path(local_path(reference))
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
    except ValueError as error:  # no base64 (binascii.Error), no ASCII
        raise Rejected("media: unreadable URL", f"{url[:60]}...: {error}") from None


def _http(url: str) -> bytes:
    """The body of a URL; what may pass (no answer, time-outs, 5xx, 429) is tried again."""
    try:
        request = urllib.request.Request(_quoted(url), headers={"User-Agent": _USER_AGENT})
    except ValueError as e:
        raise Rejected("media: unreadable URL", f"{url}: {e}") from None
    host = request.host
    until, why = _dead.get(host, (0.0, ""))
    if time.monotonic() < until:
        raise Rejected("media: unreadable URL", f"{url}: {why} (its host did not answer; left alone for {DEAD_S:.0f} s)")
    error: Exception | None = None
    answered = False
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.5 * 2**attempt)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                answered = True
                data = response.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise Rejected("media: too large", f"{url}: more than {MAX_BYTES:,} bytes")
            return data
        except urllib.error.HTTPError as e:
            error, answered = e, True
            if e.code < 500 and e.code != 429:
                break
        except (http.client.InvalidURL, ValueError) as e:
            error, answered = e, True  # no host was asked
            break
        except http.client.HTTPException as e:
            error, answered = e, True
        except OSError as e:  # refused, timed out, unknown
            error = e
    if not answered:
        _dead[host] = (time.monotonic() + DEAD_S, str(error))
    raise Rejected("media: unreadable URL", f"{url}: {error}")


def _quoted(url: str) -> str:
    """A URL as it is written in a record (spaces, accents, any script) in the characters that HTTP allows; %XX stay."""
    parts = urllib.parse.urlsplit(url)
    if not parts.netloc:
        raise ValueError("no host in it")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (urllib.parse.quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", p), "%/:=&?~+!$,;'@()*[]|") for p in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))
