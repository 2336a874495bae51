"""Malformed requests and media against a served model: what must not happen is a 5xx, a restart, a harmed neighbour, or a leak.

    python benchmarks/serve_fuzz.py                       # 10,000 requests
    python benchmarks/serve_fuzz.py --requests 400        # a short one, as the tests run it

The model is small and random. Requests are made from the server's own `/openapi.json` (hypothesis), from whole requests with parts
changed, from broken media, and from damaged bytes (`malformed.py`, `broken_media.py`), the same for the same seed. Meanwhile a neighbour
asks one question after the other and knows the right answer. The last line is JSON; the script ends with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import io
import itertools
import json
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from malformed import Malformed, Request
from PIL import Image
from shapes import ROOT

from molmo_core.models.base import BaseModelConfig
from pipelines import cluster
from pipelines.serving import client
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

LONGEST_S = 60.0
"""No answer takes so long."""
LONGEST_MESSAGE = 600
"""Characters of an error's message."""
NAME = "fuzzed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder) / "model")
        config = ServeConfig(
            model=f"{folder}/model",
            name=NAME,
            port=free_port(),
            max_new_tokens=4,
            max_batch_size=8,
            max_queued_requests=64,
            max_body_bytes=4 << 20,
            max_image_pixels=13_000_000,
            media_timeout_s=10.0,
        )
        with cluster.connect(num_cpus=4), serving(config) as url:
            report = fuzz(url, arguments)
    print(json.dumps(report))
    return int(bool(report["wrong"] or report["neighbour"]["wrong"] or report["restarted"]))


def save_random_model(folder: Path) -> None:
    """The demo's shapes with random weights."""
    import torch

    torch.manual_seed(0)
    overrides = [f"llm.tokenizer.identifier={ROOT / 'tests/golden/tokenizer'}", "llm.vocab_size=1024", "llm.max_sequence_length=1024"]
    BaseModelConfig.load(ROOT / "configs/models/demo.yaml", overrides).build_model().eval().save_checkpoint(folder)


def fuzz(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Sends all requests; what came of them."""
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as response:
        document = json.load(response)
    source = Malformed(document, NAME, arguments.seed)
    before, memory = serve_processes(), resident()
    statuses: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    wrong: list[str] = []
    slowest = 0.0
    begun = time.monotonic()
    with Neighbour(url) as neighbour, ThreadPoolExecutor(arguments.at_once) as pool:
        requests = source.requests(arguments.requests)
        while some := list(itertools.islice(requests, 500)):
            for request, (status, problem, seconds) in zip(some, pool.map(lambda request: send(url, request), some)):
                statuses[request.kind][status] += 1
                slowest = max(slowest, seconds)
                if problem:
                    wrong.append(f"{request.kind} {request.path}: {problem}: {request.body[:300]!r}")
                    print(wrong[-1], file=sys.stderr, flush=True)
    return {
        "requests": sum(sum(counter.values()) for counter in statuses.values()),
        "seconds": round(time.monotonic() - begun, 1),
        "statuses": {kind: dict(sorted(counter.items())) for kind, counter in sorted(statuses.items())},
        "slowest_s": round(slowest, 2),
        "wrong": wrong[:20],
        "restarted": sorted(before.keys() ^ serve_processes().keys()),
        "neighbour": neighbour.report(),
        "memory_mib": {"before": memory, "after": resident()},
    }


def send(url: str, request: Request) -> tuple[int, str | None, float]:
    """The status, what is wrong with the answer (None: nothing), and how long it took."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=LONGEST_S)
    begun = time.monotonic()
    try:
        connection.request("POST", request.path, request.body, {"Content-Type": request.content_type} if request.content_type else {})
        response = connection.getresponse()
        body = response.read()
        return response.status, fault(response.status, response.headers.get_content_type(), body), time.monotonic() - begun
    except (OSError, http.client.HTTPException) as error:
        return 0, f"no answer ({type(error).__name__}: {error})", time.monotonic() - begun
    finally:
        connection.close()


def fault(status: int, content_type: str, body: bytes) -> str | None:
    """What is wrong with an answer."""
    if status == 200:
        if content_type == "text/event-stream":
            if not body.endswith(b"data: [DONE]\n\n") and not any(
                b"event: response." + end in body for end in (b"completed", b"incomplete")
            ):
                return f"the stream has no end: {body[-300:]!r}"
            return f"an error in the stream: {body[-300:]!r}" if b'data: {"error"' in body else None
        return None if isinstance(json.loads(body), dict) else "not an object"
    if not 400 <= status < 500:
        return f"status {status}: {body[:300]!r}"
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"status {status} without an error that says why: {body[:300]!r}"
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters"
    return (
        f"a message that shows the inside: {message}"
        if any(word in message for word in ("Traceback", "/site-packages/", str(ROOT)))
        else None
    )


class Neighbour:
    """Asks one question after the other, and knows the answer; looks whether the server says that it lives."""

    def __init__(self, url: str) -> None:
        buffer = io.BytesIO()
        Image.fromarray(np.random.RandomState(7).randint(0, 255, (64, 64, 3), np.uint8)).save(buffer, "png")
        self._url, self._body = url, client.request(NAME, "what is it?", buffer.getvalue(), max_tokens=4)
        self._right = client.post(url, self._body)["choices"]
        self._ended = threading.Event()
        self._asked = 0
        self._wrong: list[str] = []
        self._slowest = self._slowest_health = 0.0
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def report(self) -> dict[str, Any]:
        return {
            "asked": self._asked,
            "wrong": self._wrong[:5],
            "slowest_s": round(self._slowest, 2),
            "slowest_health_s": round(self._slowest_health, 2),
        }

    def _work(self) -> None:
        while not self._ended.wait(0.1):
            self._asked += 1
            try:
                begun = time.monotonic()
                if client.post(self._url, self._body)["choices"] != self._right:
                    self._wrong.append("another answer")
                asked = time.monotonic()
                urllib.request.urlopen(f"{self._url}/health", timeout=LONGEST_S).close()
                self._slowest_health = max(self._slowest_health, time.monotonic() - asked)
                self._slowest = max(self._slowest, asked - begun)
            except (OSError, ValueError) as error:
                self._wrong.append(f"{type(error).__name__}: {error}")


def serve_processes() -> dict[str, float]:
    """The processes of the application, by id and kind."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if title.startswith(("ray::Serve", "ray::Proxy")):  # and, behind a dot, what it does just now
                found[f"{process.pid} {title.partition('.')[0].strip()}"] = process.memory_info().rss / 2**20
        except psutil.Error:
            continue
    return found


def resident() -> dict[str, int]:
    """MiB of each of them, by kind."""
    return {name.partition(" ")[2]: round(size) for name, size in serve_processes().items()}


if __name__ == "__main__":
    sys.exit(main())
