"""Who may ask: API keys, and the guard in front of the routes.

Keys are read where the server is started. What travels to the frontends are their SHA-256 digests: with those nobody can ask.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from molmo_core.config import ConfigError
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError

VARIABLE = "MOLMO_API_KEYS"
"""Environment variable with keys, separated by commas or white space."""
SHORTEST = 16
"""Characters of a key: shorter ones can be guessed."""
OPEN = ("/health", "/")
"""What is answered without a key: whether the server lives, and the page, which asks for one."""
OPEN_FOLDER = "/page/"

_KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")  # what HTTP lets a bearer token hold


def key_digests(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> list[bytes]:
    """The digests of the API keys of a server; none = everybody may ask.

    Raises:
        ConfigError: no keys although others than this machine can reach the server; a file that is missing, empty, or readable by
            everybody; a key that is short or cannot be sent. No message repeats a key.
    """
    if config.api_keys_file is not None:
        source = config.api_keys_file
        keys = _read(Path(source)).split()
    elif VARIABLE in environment:
        source = VARIABLE
        keys = environment[VARIABLE].replace(",", " ").split()
    elif is_loopback(config.host):
        return []
    else:
        raise ConfigError(
            f"serve: host={config.host} is reached by other machines, and there are no API keys; name a file with them, one a line "
            f"(api_keys_file=...), set {VARIABLE}, or listen on this machine only (host=127.0.0.1)"
        )
    if not keys:
        raise ConfigError(f"serve: {source} holds no API key")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST:
            raise ConfigError(f"serve: key {number} of {source} has fewer than {SHORTEST} characters; make one with: openssl rand -hex 32")
        if not _KEY.fullmatch(key):
            raise ConfigError(f"serve: key {number} of {source} holds characters that cannot be sent as a bearer token")
    return [_digest(key) for key in keys]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class KeyGuard:
    """ASGI middleware: nothing but what is `OPEN` is answered without a key.

    Args:
        app: the application.
        digests: asked for each request; empty = everybody may ask.
    """

    def __init__(self, app: ASGIApp, digests: Callable[[], Sequence[bytes]]) -> None:
        self._app, self._digests = app, digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]):
            try:
                check_key([value for name, value in scope["headers"] if name == b"authorization"], self._digests())
            except ApiError as error:
                await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_key(headers: Sequence[bytes], digests: Sequence[bytes]) -> None:
    """Raises ApiError 401 unless the `Authorization` headers of a request name a key. The time it takes says nothing about the keys."""
    if not digests:
        return
    scheme, _, token = headers[0].partition(b" ") if len(headers) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer":
        raise ApiError(401, "This server asks for an API key: send the header 'Authorization: Bearer KEY'.", None, "missing_api_key")
    given = hashlib.sha256(token.strip()).digest()
    known = False
    for digest in digests:
        known |= hmac.compare_digest(given, digest)
    if not known:
        raise ApiError(401, "The API key is not one of this server's.", None, "invalid_api_key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_FOLDER)


def _read(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise ConfigError(f"serve: {path} can be read or changed by others ({stat.filemode(mode)}); run: chmod 600 {path}")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"serve: the API keys cannot be read from {path}: {reason}") from None
