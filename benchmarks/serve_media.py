"""What pictures cost a served model, and what others feel of them.

    python benchmarks/serve_media.py           # on a GPU: Molmo2-4B's shapes, random weights
    python benchmarks/serve_media.py --tiny    # on any CPU: the model costs next to nothing, so the service is measured

First the throughput of many requests, a fixed number of them at a time: with a fresh picture in each (768 x 1024, JPEG), and with text of
as many tokens. `share` is the one by the other. Then a burst of large pictures (4000 x 3000): `models_s` is how long `/v1/models` takes
meanwhile, asked every 50 ms, and `gaps_s` are those between the events of an answer that was being streamed before, `quiet` until the
burst, `burst` during it. Every line is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from serve_load import percentiles, save_random_model
from streams import Stream, cpu_seconds, streams

from molmo_core.registry import BaseModelConfig
from pipelines import cluster
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

POLL_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--burst", type=int, default=64, help="large pictures that arrive together")
    parser.add_argument("--frontends", type=int, default=2)
    parser.add_argument("--media-workers", type=int, default=4, help="of a frontend")
    parser.add_argument("--clients", type=int, default=4, help="processes that send and read")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available() and not arguments.tiny
    print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu", **vars(arguments)}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder) / "model", arguments.tiny, gpu)
        config = ServeConfig(
            model=f"{folder}/model",
            name="load",
            port=free_port(),
            frontends=arguments.frontends,
            media_workers=arguments.media_workers,
            media_cache_bytes=0,
            gpus_per_replica=int(gpu),
            dtype="bfloat16" if gpu else "float32",
            max_batch_size=arguments.at_once,
            max_queued_requests=1024,
        )
        with cluster.connect(num_cpus=cluster.cpus_for(2, all_cores=True)), serving(config) as url:
            tokenizer = BaseModelConfig.load(f"{folder}/model").build_tokenizer()
            for _ in range(arguments.rounds):
                print(json.dumps(throughput(url, tokenizer, arguments)), flush=True)
                print(json.dumps(burst(url, arguments)), flush=True)


def throughput(url: str, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Requests with a picture each, and the same number with as much text."""
    count, new = arguments.requests, arguments.new
    pictures = [body(f"What is picture {number}?", new, jpeg(1024, 768, number)) for number in range(count)]
    tokens = prompt_tokens(url, pictures[0])
    texts = [body(text_of(tokenizer, tokens, number), new) for number in range(count)]
    line: dict[str, Any] = {"requests": count, "at_once": arguments.at_once, "prompt_tokens": tokens, "new": new}
    for name, bodies in (("text", texts), ("pictures", pictures)):
        before = cpu_seconds(psutil.Process())
        results = checked(streams(url, bodies, arguments.clients, arguments.at_once))
        after = cpu_seconds(psutil.Process())
        seconds = max(result.arrivals[-1][0] for result in results) - min(result.asked for result in results)
        line[name] = {
            "requests_s": round(count / seconds, 2),
            "new_tokens_s": round(sum(result.tokens for result in results) / seconds, 1),
            "first_token_s": percentiles([result.arrivals[0][0] - result.asked for result in results]),
            "cpu_ms_request": {kind: round(1000 * (after[kind] - before.get(kind, 0)) / count, 1) for kind in sorted(after)},
        }
    return {**line, "share": round(line["pictures"]["new_tokens_s"] / line["text"]["new_tokens_s"], 3)}


def burst(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What an answer and `/v1/models` feel of large pictures that arrive together."""
    large = [jpeg(4000, 3000, number) for number in range(8)]
    bodies = [body(f"What is picture {number}?", 1, large[number % len(large)]) for number in range(arguments.burst)]
    arrivals: list[float] = []
    polled: list[tuple[float, float]] = []
    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        watching = pool.submit(watch, url, body("Count.", context(url) - 100), arrivals, done)
        polling = pool.submit(poll, url, polled, done)
        while len(arrivals) < 20 and not watching.done():
            time.sleep(POLL_S)
        try:
            results = checked(streams(url, bodies, arguments.clients))  # its processes take seconds to start, which are quiet
        finally:
            done.set()
        polling.result()
        watching.result()
    start = min(result.asked for result in results)
    end = max(result.arrivals[-1][0] for result in results)
    gaps = [(late, late - early) for early, late in itertools.pairwise(arrivals)]
    quiet, busy = [gap for late, gap in gaps if late < start], [gap for late, gap in gaps if start <= late <= end]
    if len(quiet) < 20 or len(busy) < 20:
        raise RuntimeError(f"the answer was watched too shortly: {len(quiet)} events before, {len(busy)} during the burst")
    during = [seconds for moment, seconds in polled if start <= moment <= end]
    return {
        "burst": arguments.burst,
        "bytes": len(large[0]),
        "seconds": round(end - start, 2),
        "models_s": {**percentiles(during), "max": round(max(during), 4), "asked": len(during)},
        "gaps_s": {name: {**percentiles(values), "max": round(max(values), 4)} for name, values in (("quiet", quiet), ("burst", busy))},
        "gap_by_median": round(max(busy) / statistics.median(quiet), 2),
    }


def watch(url: str, request: dict[str, Any], arrivals: list[float], done: threading.Event) -> None:
    """Reads an answer until `done`, and when each of its events came."""
    data = json.dumps({**request, "stream": True}).encode()
    call = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call) as response:
        for line in response:
            if line.startswith(b"data: {"):
                arrivals.append(time.time())
            if done.is_set():
                return


def poll(url: str, polled: list[tuple[float, float]], done: threading.Event) -> None:
    """Asks for the models every 50 ms: when, and how long it took."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    while not done.is_set():
        start = time.time()
        connection.request("GET", "/v1/models")
        connection.getresponse().read()
        polled.append((start, time.time() - start))
        done.wait(max(0.0, POLL_S - polled[-1][1]))


def checked(results: list[Stream]) -> list[Stream]:
    problems = [result.problem for result in results if result.problem]
    if problems:
        raise RuntimeError(f"{len(problems)} of {len(results)} requests failed: {problems[0]}")
    return results


def context(url: str) -> int:
    """Tokens of the longest prompt and answer."""
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        return json.load(response)["data"][0]["max_model_len"]


def prompt_tokens(url: str, request: dict[str, Any]) -> int:
    call = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps({**request, "max_tokens": 1}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call) as response:
        return json.load(response)["usage"]["prompt_tokens"]


def text_of(tokenizer: Any, tokens: int, seed: int) -> str:
    """About so many tokens of made-up words, others for each seed."""
    draw = np.random.RandomState(seed)
    words = [f" w{number}" for number in draw.randint(0, 1000, tokens)]
    length = len(tokenizer.encode("".join(words)))
    return "".join(words[: tokens * tokens // length])


def body(text: str, new: int, picture: bytes | None = None) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"model": "load", "messages": [{"role": "user", "content": content}], "max_tokens": new, "ignore_eos": True}


def jpeg(width: int, height: int, seed: int) -> bytes:
    """A picture that takes as many bytes as a photograph of its size."""
    noise = np.random.RandomState(seed).randint(0, 255, (height // 8, width // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
