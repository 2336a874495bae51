"""A small client of the API (standard library only): what the demo and the tests talk with."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

TIMEOUT_S = 60


def request(model: str, text: str, image: bytes, **settings: Any) -> dict[str, Any]:
    """The body of a chat request with one image (a file's bytes); `settings` are further fields, e.g. `max_tokens=5`."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
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
