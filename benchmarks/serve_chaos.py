"""What survives: requests of every kind while processes of the server are killed; or, for an hour, whether its memory grows.

    python benchmarks/serve_chaos.py                          # 1,000 requests, 32 at once, a SIGKILL every 4 s (each fourth a frontend's)
    python benchmarks/serve_chaos.py --kill-every 0 --minutes 60    # nobody is killed: memory of every process, its slope in MiB a minute

Any machine will do: the model is a small random Molmo2, which takes text, images and a video, and answers greedily. Every
answer is compared with what the undisturbed server says. The client does what OpenAI's does: a connection that breaks before anything came,
and a 5xx, are tried twice more (`retried` says what came). One JSON object at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import io
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import cv2
import numpy as np
import psutil
import torch
from PIL import Image
from serve_load import save_random_model

from molmo_core.checkpoint import load_model
from pipelines import cluster
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

HANGS_S = 180.0
CLIENT_TRIES = 3
SHOWN = 10
"""Answers that were not right, whole in the result."""
SAMPLE_S = 5.0
SETTLED_S = 0.5


class Outcome(NamedTuple):
    """How a request ended: `right`, `wrong`, `error event`, `broken` (a stream without an end), `hangs`, or a status."""

    kind: str
    tries: int
    text: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=0, help="send requests for so long, however many")
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--kill-every", type=float, default=4.0, help="seconds; 0: nobody is killed")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--frontends", type=int, default=2)
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_varied_model(Path(folder))
        config = ServeConfig(
            model=f"{folder}/model",
            name="chaos",
            port=free_port(),
            replicas=arguments.replicas,
            frontends=arguments.frontends,
            cpus_per_replica=0.5,
            media_workers=1,
        )
        with cluster.connect(num_cpus=cluster.cpus_for(config.cpus), object_store_memory=512 << 20), serving(config) as url:
            print(json.dumps(asyncio.run(run(url, arguments))), flush=True)


def save_varied_model(folder: Path) -> None:
    """A small random Molmo2 whose blocks weigh more than the last token, so that answers differ with the question."""
    save_random_model(folder / "random", tiny=True, gpu=False)
    model = load_model(folder / "random")
    with torch.no_grad():
        for parameter in (*model.transformer.blocks.parameters(), *model.vision_backbone.parameters()):
            parameter.mul_(12.0 if parameter.ndim > 1 else 1.0)
    model.save_checkpoint(folder / "model")


async def run(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, and its numbers."""
    bodies = questions(arguments.new)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        calm = []
        for body in bodies:
            answer = await ask(session, url, body)
            if answer.kind != "answered":
                raise RuntimeError(f"the undisturbed server does not answer: {answer}")
            calm.append(answer.text)
        there = {"model": arguments.replicas, "frontend": arguments.frontends}
        started, left, memory = time.monotonic(), iter(range(10**9 if arguments.minutes else arguments.requests)), Memory()
        outcomes: list[tuple[bool, Outcome, float]] = []
        killer = asyncio.create_task(kill(arguments.kill_every, there)) if arguments.kill_every else None
        sampler = asyncio.create_task(memory.sample())

        async def client() -> None:
            for number in left:
                if arguments.minutes and time.monotonic() - started > 60 * arguments.minutes:
                    return
                body, streamed, begun = bodies[number % len(bodies)], number // len(bodies) % 2 == 1, time.monotonic()
                got = await ask(session, url, {**body, "stream": streamed})
                if got.kind == "answered":
                    got = got._replace(kind="right" if got.text == calm[number % len(bodies)] else "wrong")
                outcomes.append((streamed, got, time.monotonic() - begun))

        await asyncio.gather(*(client() for _ in range(arguments.concurrent)))
        for task in (killer, sampler):
            if task is not None:
                task.cancel()
    seconds = sorted(duration for _, _, duration in outcomes)
    count = collections.Counter
    bad = [(streamed, got) for streamed, got, _ in outcomes if got.kind != "right"]
    return {
        "distinct_answers": len(set(calm)),
        "requests": len(outcomes),
        "whole": dict(count(got.kind for streamed, got, _ in outcomes if not streamed)),
        "streamed": dict(count(got.kind for streamed, got, _ in outcomes if streamed)),
        "bad": [{"streamed": streamed, **got._asdict()} for streamed, got in bad[:SHOWN]],
        "retried": dict(RETRIED),
        "killed": dict(KILLED),
        "seconds": {
            "all": round(time.monotonic() - started, 1),
            "p50": seconds[len(seconds) // 2],
            "p99": seconds[len(seconds) * 99 // 100],
        },
        "memory": memory.report(),
    }


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Outcome:
    """One request, as OpenAI's client sends it."""
    got = Outcome("not asked", 0)
    for tries in range(1, CLIENT_TRIES + 1):
        try:
            async with asyncio.timeout(HANGS_S):
                got = (await _once(session, url, body))._replace(tries=tries)
        except TimeoutError:
            return Outcome("hangs", tries)
        if tries == CLIENT_TRIES or (got.kind != "no connection" and not got.kind.startswith("5")):
            break
        RETRIED[f"{got.kind} {got.text[:80]}".strip()] += 1
        await asyncio.sleep(0.5 * tries)
    return got


async def _once(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Outcome:
    data, status = b"", 0
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            status = response.status
            async for part in response.content.iter_any():
                data += part
    except aiohttp.ClientError:
        return Outcome("broken" if data and body.get("stream") else "no connection", 1)
    if status != 200:
        return Outcome(str(status), 1, data.decode()[:200])
    if not body.get("stream"):
        return Outcome("answered", 1, json.loads(data)["choices"][0]["message"]["content"])
    text, ended = "", False
    for event in data.decode().split("\n\n"):
        if event == "data: [DONE]":
            ended = True
        elif event:
            chunk = json.loads(event.removeprefix("data: "))
            if "error" in chunk:
                return Outcome("error event", 1, str(chunk["error"])[:200])
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return Outcome("answered" if ended else "broken", 1, text)


KILLED: collections.Counter[str] = collections.Counter()
RETRIED: collections.Counter[str] = collections.Counter()
"""Tries that were not the last one, by what came instead of an answer."""


async def kill(every: float, count: dict[str, int]) -> None:
    """Kills a replica of the model every so many seconds, and now and then a frontend; but not before the last one was replaced: where
    a replica takes longer to start than the next kill to come, there would never be any.

    Args:
        count: how many there are of each kind.
    """
    choose = random.Random(0)
    while True:
        await asyncio.sleep(every)
        kind = "frontend" if sum(KILLED.values()) % 4 == 3 else "model"
        while len(victims := [process for process, name, starts in processes() if name == kind and not starts]) < count[kind]:
            await asyncio.sleep(SETTLED_S)
        choose.choice(victims).kill()
        KILLED[kind] += 1


def processes() -> list[tuple[psutil.Process, str, bool]]:
    """The server's own processes, what they are, and whether they are still starting."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "ServeReplica:molmo:" in line:
            name, *does = re.split(r"[. ]", line.split("ServeReplica:molmo:")[1])  # followed by what it does just now
            found.append((process, name, "__init__" in does or "initialize_and_get_metadata" in does))
        elif "Proxy" in line or "ServeController" in line or "haproxy" in line:
            found.append((process, "proxy" if "ServeController" not in line else "controller", False))
    return found


class Memory:
    """Resident memory of every process over time."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], list[tuple[float, float]]] = {}

    async def sample(self) -> None:
        while True:
            for process, name, _ in processes():
                try:
                    size = process.memory_info().rss / 2**20
                except psutil.NoSuchProcess:
                    continue
                self._samples.setdefault((name, process.pid), []).append((time.monotonic() / 60, size))
            await asyncio.sleep(SAMPLE_S)

    def report(self) -> dict[str, dict[str, float]]:
        """MiB at the end and its slope in MiB a minute, the first third left out as warm-up; of processes that lived to the end."""
        last = max((samples[-1][0] for samples in self._samples.values()), default=0)
        lines = {}
        for (name, pid), samples in self._samples.items():
            steady = samples[len(samples) // 3 :]
            if len(steady) >= 2 and last - samples[-1][0] < 2 * SAMPLE_S / 60:
                times, sizes = np.array(steady).T
                lines[f"{name} {pid}"] = {"mib": round(sizes[-1], 1), "mib_minute": round(float(np.polyfit(times, sizes, 1)[0]), 3)}
        return lines


def questions(new: int) -> list[dict[str, Any]]:
    """Requests of every kind, each with its own words and media."""
    rng = np.random.RandomState(0)
    bodies = []
    for number in range(40):
        media = [[], [picture(rng)], [picture(rng), picture(rng)], [clip(rng)] if number % 8 == 3 else [picture(rng)]][number % 4]
        text = " ".join(f"w{word}" for word in rng.randint(0, 500, 6))
        content = [*media, {"type": "text", "text": text}]
        bodies.append({"model": "chaos", "messages": [{"role": "user", "content": content}], "max_tokens": new, "ignore_eos": True})
    return bodies


def picture(rng: np.random.RandomState) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(rng.randint(0, 255, (96, 128, 3), np.uint8)).save(buffer, "png")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}}


def clip(rng: np.random.RandomState) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        writer = cv2.VideoWriter(file.name, cv2.VideoWriter.fourcc(*"mp4v"), 4, (128, 96))
        for _ in range(8):
            writer.write(cv2.resize(rng.randint(0, 255, (12, 16, 3), np.uint8), (128, 96)))
        writer.release()
        data = base64.b64encode(Path(file.name).read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}


if __name__ == "__main__":
    main()
