"""Fetches media from addresses, for servers that allow it: from listed hosts, at public addresses, within limits of size and time.

A server that fetches for others can be made to read its own network (SSRF). So a name is resolved once, all of its addresses are checked,
and one of those is dialled, while TLS checks the certificate against the name. A redirect is checked as the first address was.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipelines.serving.errors import ApiError, bad_request, queue_full, shown
from pipelines.serving.media.addresses import host_and_port, is_public
from pipelines.serving.media.parts import Medium, check_type

Resolve = Callable[[str, int], Awaitable[list[tuple[Any, ...]]]]
"""As `socket.getaddrinfo`: of a name and a port."""

REDIRECTS = 3
_REDIRECTED = (301, 302, 303, 307, 308)
_URL = re.compile(r"[!-\[\]-~]{1,4096}")  # visible ASCII without the backslash, which some take for a slash
_BINARY = ("application/octet-stream", "binary/octet-stream")
"""Media types by which stores of files say that they do not know."""
_CHUNK = 1 << 16


class Fetcher:
    """Fetches media. Used from one event loop.

    Args:
        hosts: from which it may fetch: `name`, or `name:port` for another port than 443.
        max_bytes: of a file.
        timeout_s: from the name's resolution to the last byte, redirects included.
        places: files that are fetched at a time; the next one is refused.
        allowed: which addresses are dialled; only tests, whose servers are on this machine, allow others.
        resolve: only tests give another.
        tls: how certificates are checked; None = as the system does.

    Raises:
        ConfigError: a host that is no name.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        timeout_s: float,
        places: int,
        *,
        allowed: Callable[[str], bool] = is_public,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = {host_and_port(entry) for entry in hosts}
        self._max_bytes, self._timeout_s, self._places = max_bytes, timeout_s, places
        self._allowed, self._tls = allowed, tls or ssl.create_default_context()
        self._resolve = resolve or self._system_resolve
        self._threads = ThreadPoolExecutor(4, "resolver")  # not those that everything else uses: names can take long
        self._inside = 0

    async def __call__(self, medium: Medium) -> bytes:
        """The file at a medium's address.

        Raises:
            ApiError: 400, the address is not allowed or gives no such file; 429, too many are being fetched.
        """
        if self._inside >= self._places:
            raise queue_full()
        self._inside += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._fetch(medium)
        except TimeoutError:
            raise self._failed(medium, f"it did not come within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = (
                "its certificate is not accepted" if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError) else "it cannot be reached"
            )
            raise self._failed(medium, reason) from error
        finally:
            self._inside -= 1

    async def _fetch(self, medium: Medium) -> bytes:
        url = first = self._checked(medium.url, medium)
        connector = aiohttp.TCPConnector(resolver=_Resolver(self, medium), use_dns_cache=False, force_close=True, ssl=self._tls)
        headers = {"Accept": f"{medium.kind}/*", "Accept-Encoding": "identity", "User-Agent": "molmo-pipelines"}
        async with aiohttp.ClientSession(
            connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False
        ) as session:
            for _ in range(REDIRECTS + 1):
                async with session.get(url, allow_redirects=False) as response:
                    if response.status in _REDIRECTED and "Location" in response.headers:
                        url = self._checked(str(url.join(URL(response.headers["Location"], encoded=True))), medium)
                        if url.port != first.port:
                            raise self._failed(medium, "it redirects to another port")
                        continue
                    return await self._read(response, medium)
        raise self._failed(medium, f"it redirects more than {REDIRECTS} times")

    async def _read(self, response: aiohttp.ClientResponse, medium: Medium) -> bytes:
        if response.status != 200:
            raise self._failed(medium, f"its server answers with status {response.status}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._failed(medium, "its server sends it compressed")
        if response.content_type not in _BINARY:
            check_type(response.content_type, medium)
        data = bytearray()
        if (response.content_length or 0) <= self._max_bytes:
            async for chunk in response.content.iter_chunked(_CHUNK):
                data += chunk
                if len(data) > self._max_bytes:
                    break
            else:
                return bytes(data)
        raise self._failed(medium, f"it has more than the {self._max_bytes:,} bytes that this server takes")

    def _checked(self, url: str, medium: Medium) -> URL:
        """An address that may be fetched, as it will be dialled."""
        try:
            parsed = URL(url, encoded=True) if _URL.fullmatch(url) else URL()
            host, port = parsed.raw_host, parsed.port
        except ValueError:
            parsed, host, port = URL(), None, None
        if parsed.scheme != "https" or not host:
            raise self._refused(medium, "only https addresses are fetched")
        if parsed.raw_user is not None or parsed.raw_password is not None:
            raise self._refused(medium, "an address with a user or a password is not fetched")
        if (host.lower(), port) not in self._hosts:
            raise self._refused(medium, f"this server does not fetch from {shown(host)}, port {port}")
        return parsed.with_fragment(None)

    async def addresses(self, host: str, port: int, medium: Medium) -> list[tuple[Any, ...]]:
        """What a name resolves to, if all of it may be dialled."""
        found = await self._resolve(host, port)
        if not found or not all(self._allowed(each[4][0]) for each in found):
            raise self._refused(medium, f"{shown(host)} is not at a public address")
        return found

    async def _system_resolve(self, host: str, port: int) -> list[tuple[Any, ...]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))

    @staticmethod
    def _refused(medium: Medium, reason: str) -> ApiError:
        return bad_request(f"{medium.where}: {reason}.", medium.where, "url_not_supported")

    @staticmethod
    def _failed(medium: Medium, reason: str) -> ApiError:
        return bad_request(f"{medium.where}: the {medium.kind} could not be fetched: {reason}.", medium.where, medium.invalid("url"))


class _Resolver(AbstractResolver):
    """What aiohttp asks for the addresses of a name; it dials no others."""

    def __init__(self, fetcher: Fetcher, medium: Medium) -> None:
        self._fetcher, self._medium = fetcher, medium

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._fetcher.addresses(host, port, self._medium)
        return [
            ResolveResult(hostname=host, host=address[0], port=port, family=kind, proto=proto, flags=socket.AI_NUMERICHOST)
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        """Nothing is open."""
