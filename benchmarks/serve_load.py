"""What the service costs: tokens a second of concurrent streams through HTTP, beside what the engine generates alone.

    python benchmarks/serve_load.py                       # on a GPU: Molmo2-4B's shapes, random weights, prompts of 1,400 tokens
    python benchmarks/serve_load.py --images 768x1024     # a fresh picture of that size in every request
    python benchmarks/serve_load.py --tiny                # on any CPU: the model costs next to nothing, so the service is measured

Decoding is timed while all answers are in work, as in decode.py: from the last answer's first text to the first answer's end. `share` is
that rate by the engine's own, measured first, in a process of its own. With `RAY_SERVE_ENABLE_HA_PROXY=1` HAProxy stands in front
instead of Ray Serve's proxy. `cpu_ms_token` is the CPU time of all processes of a kind for a
token of the whole run. Every line is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from shapes import ROOT, model_config, random_model
from streams import Stream, cpu_seconds, streams

from molmo_core.registry import BaseModelConfig
from pipelines import cluster
from pipelines.serving.app import serving
from pipelines.serving.config import ServeConfig
from pipelines.serving.port import free_port

TEXT_TOKENS = 1400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--streams", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--images", help="WIDTHxHEIGHT of a picture in every request")
    parser.add_argument("--frontends", type=int, default=4)
    parser.add_argument("--clients", type=int, default=4, help="processes that read the answers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="measure the engine alone, too (always on a GPU)")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available() and not arguments.tiny
    print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu", **vars(arguments)}), flush=True)
    own = engine_rates(arguments) if gpu or arguments.alone else {}
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder) / "model", arguments.tiny, gpu)
        config = ServeConfig(
            model=f"{folder}/model",
            name="load",
            port=free_port(),
            frontends=arguments.frontends,
            gpus_per_replica=int(gpu),
            dtype="bfloat16" if gpu else "float32",
            max_batch_size=max(arguments.streams),
            max_queued_requests=1024,
        )
        with cluster.connect(num_cpus=cluster.cpus_for(2, all_cores=True)), serving(config) as url:
            tokenizer = BaseModelConfig.load(folder + "/model").build_tokenizer()
            for count in arguments.streams:
                for _ in range(arguments.rounds):
                    line = measure(url, count, tokenizer, arguments)
                    if count in own and line["decode_tokens_s"]:
                        line |= {"engine_tokens_s": own[count], "share": round(line["decode_tokens_s"] / own[count], 3)}
                    print(json.dumps(line), flush=True)


def engine_rates(arguments: argparse.Namespace) -> dict[int, float]:
    """Decoded tokens a second of the engine without a service, by answers in work."""
    command = [sys.executable, str(ROOT / "benchmarks/decode.py"), "--batch", *map(str, arguments.streams), "--new", str(arguments.new)]
    command += ["--text"] if not arguments.images else []
    command += ["--tiny"] if arguments.tiny else []
    run = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {line["batch"]: line["decode_tokens_s"] for line in lines if "batch" in line}


def save_random_model(folder: Path, tiny: bool, gpu: bool) -> None:
    """A checkpoint of random weights, and a tokenizer of the full size whose words are made up."""
    config = model_config(tiny)
    tokenizer = json.loads((ROOT / "tests/golden/tokenizer/tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    known = 1 + max(words.values())
    words |= {f"Ġw{i}": i for i in range(known, config.llm.vocab_size)}
    source = folder.with_name("tokenizer")
    source.mkdir()
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text((ROOT / "tests/golden/tokenizer/tokenizer_config.json").read_text())
    config.llm.tokenizer.identifier = str(source)
    model = random_model(config, torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32)
    with torch.no_grad():
        model.transformer.wte.embedding[:known] *= 0.1  # answers are of made-up words, which are never blank
    model.save_checkpoint(folder)
    del model
    torch.cuda.empty_cache()


def measure(url: str, count: int, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """So many streams at once."""
    bodies = [body(tokenizer, arguments) for _ in range(count)]
    root = psutil.Process()
    before = cpu_seconds(root)
    results = streams(url, bodies, arguments.clients)
    after = cpu_seconds(root)
    problems = [result.problem for result in results if result.problem]
    if problems:
        raise RuntimeError(f"{len(problems)} of {count} streams failed: {problems[0]}")
    first = [result.arrivals[0][0] - result.asked for result in results]
    gaps = [late[0] - early[0] for result in results for early, late in zip(result.arrivals, result.arrivals[1:])]
    tokens = sum(result.tokens for result in results)
    events = sum(len(result.arrivals) for result in results)
    return {
        "streams": count,
        "images": arguments.images,
        "decode_tokens_s": decode_rate(results),
        "tokens_event": round(tokens / events, 2),
        "first_token_s": percentiles(first),
        "between_events_s": percentiles(gaps),
        "cpu_ms_token": {kind: round(1000 * (after[kind] - before.get(kind, 0)) / tokens, 3) for kind in sorted(after)},
    }


def decode_rate(results: list[Stream]) -> float | None:
    """Tokens a second while all answers are in work; None if there is no such time: then answers should be longer (`--new`).

    An answer's tokens are spread over its text: the words are random.
    """
    start = max(result.arrivals[0][0] for result in results)
    end = min(result.arrivals[-1][0] for result in results)
    if end <= start:
        return None
    tokens = 0.0
    for result in results:
        inside = sum(characters for moment, characters in result.arrivals if start < moment <= end)
        tokens += result.tokens * inside / sum(characters for _, characters in result.arrivals)
    return round(tokens / (end - start), 1)


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = statistics.quantiles(values, n=20) if len(values) > 1 else values * 19
    return {"p50": round(statistics.median(values), 4), "p95": round(ordered[18], 4), "max": round(max(values), 4)}


def body(tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """A request whose prompt nobody has sent before."""
    wanted = 40 if arguments.tiny else 100 if arguments.images else TEXT_TOKENS
    text = ""
    while len(tokenizer.encode(text)) < wanted:
        text += "".join(f" w{random.randrange(1000)}" for _ in range(1 + wanted // 20))
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if arguments.images:
        width, height = map(int, arguments.images.split("x"))
        noise = np.random.randint(0, 255, (height // 8, width // 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((width, height)).save(buffer, "jpeg", quality=85)
        url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"model": "load", "messages": [{"role": "user", "content": content}], "max_tokens": arguments.new, "ignore_eos": True}


if __name__ == "__main__":
    main()
