"""A small client of the API (standard library only): what the demo and the tests talk with."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

TIMEOUT_S = 60


def request(model: str, text: str, media: bytes, kind: str = "image/png", **settings: Any) -> dict[str, Any]:
    """The body of a chat request with one image or video (a file's bytes, and its type: `video/mp4`); `settings` are further fields, e.g.
    `max_tokens=5`."""
    part = f"{kind.partition('/')[0]}_url"
    content = [{"type": part, part: {"url": f"data:{kind};base64,{base64.b64encode(media).decode()}"}}, {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], **settings}


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    with _open(url, body) as response:
        return json.load(response)


def stream(url: str, body: dict[str, Any]) -> Iterator[str]:
    """The text of a streamed answer in pieces, as they come; raises as `deltas`."""
    return (delta.get("content", "") for delta in deltas(url, body))


def deltas(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a streamed answer adds, piece by piece: `content` and `points`.

    Raises:
        RuntimeError: the server reported an error in the stream.
    """
    with _open(url, {**body, "stream": True}) as response:
        for line in response:
            event = line.decode().removeprefix("data: ").strip()
            if event and event != "[DONE]":
                chunk = json.loads(event)
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                yield from (choice["delta"] for choice in chunk["choices"])


def _open(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(call, timeout=TIMEOUT_S)
