"""Many streams at once, from processes of their own, so that the clients are not what is measured: when which text came."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import aiohttp
import psutil


class Stream(NamedTuple):
    """What one request got."""

    asked: float
    """Seconds of the machine's clock, like all times."""
    arrivals: list[tuple[float, int]]
    """Time and characters of every event with text."""
    tokens: int
    """Of the answer, by its usage."""
    problem: str | None
    """What went wrong."""


def streams(url: str, bodies: list[dict[str, Any]], processes: int, at_once: int | None = None) -> list[Stream]:
    """Sends all requests, at most `at_once` at a time (None = all at once), and reads their answers to the end."""
    start = time.time() + 2 + 0.02 * len(bodies)  # all processes are ready by then
    parts = [bodies[i::processes] for i in range(processes)]
    places = -(-(at_once or len(bodies)) // processes)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_client, url, part, start, places) for part in parts if part]
        return [stream for job in jobs for stream in job.result()]


def cpu_seconds(root: psutil.Process) -> dict[str, float]:
    """CPU time so far of the served application's processes, by kind."""
    seconds: dict[str, float] = {}
    for process in root.children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            kinds = {"molmo:model": "replicas", "molmo:frontend": "frontends", "Proxy": "proxies", "haproxy": "proxies"}
            kind = next((kind for part, kind in kinds.items() if part in line), None)
            if kind is not None:
                times = process.cpu_times()
                seconds[kind] = seconds.get(kind, 0.0) + times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return seconds


def _client(url: str, bodies: list[dict[str, Any]], start: float, places: int) -> list[Stream]:
    encoded = [json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode() for body in bodies]
    return asyncio.run(_all(url, encoded, start, places))


async def _all(url: str, bodies: list[bytes], start: float, places: int) -> list[Stream]:
    free = asyncio.Semaphore(places)

    async def one(body: bytes) -> Stream:
        async with free:
            return await _one(session, url, body)

    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.sleep(max(0.0, start - time.time()))
        return await asyncio.gather(*map(one, bodies))


async def _one(session: aiohttp.ClientSession, url: str, body: bytes) -> Stream:
    asked = time.time()
    received: list[tuple[float, bytes]] = []
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as response:
        if response.status != 200:
            return Stream(asked, [], 0, f"{response.status}: {(await response.text())[:200]}")
        async for data, _ in response.content.iter_chunks():
            received.append((time.time(), data))  # read later: now only the clock counts
    return _stream(asked, received)


def _stream(asked: float, received: list[tuple[float, bytes]]) -> Stream:
    arrivals: list[tuple[float, int]] = []
    tokens, problem, rest, ended = 0, None, b"", False
    for moment, data in received:
        *events, rest = (rest + data).split(b"\n\n")
        characters = 0
        for event in events:
            if event == b"data: [DONE]":
                ended = True
                continue
            chunk = json.loads(event.removeprefix(b"data: "))
            if "error" in chunk:
                problem = str(chunk["error"])[:200]
                continue
            characters += sum(len(choice["delta"].get("content") or "") for choice in chunk["choices"])
            tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
        if characters:
            arrivals.append((moment, characters))
    return Stream(asked, arrivals, tokens, problem or (None if ended else "the stream broke off"))
