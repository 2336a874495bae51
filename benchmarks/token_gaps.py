"""How long a stream waits between two tokens while prompts are read, by how much of them a step reads.

    python benchmarks/token_gaps.py                   # on a GPU: Molmo2-4B, prompts of 1,400 tokens with a picture of 7 crops, bfloat16
    python benchmarks/token_gaps.py --tiny            # on any CPU: checks the script

One answer is in work alone (`quiet_ms`, median), then others are kept in work beside it: each that ends is followed by another with a
fresh picture. `gap_ms` is what the one waits for its tokens meanwhile: median, 99 of 100, longest. `tokens_s` counts all answers, reading
included. `slice_tokens: null` reads prompts whole. One JSON line a setting; the first says what machine and versions these are.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from shapes import model_config, prompt, random_model

from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.requests import Request, SamplingParams, Token

SLICES = (None, 4096, 2048, 1024, 512, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--streams", type=int, default=32, help="in work beside the one")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=128, help="prompts with a picture, a setting")
    parser.add_argument("--slices", type=int, nargs="*", default=list(SLICES), help="0: whole")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    if arguments.tiny:
        arguments.streams, arguments.new, arguments.requests = 2, 8, 6
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"torch": torch.__version__, "device": name, **vars(arguments)}), flush=True)
    model = random_model(model_config(arguments.tiny), device, torch.float32 if arguments.tiny else torch.bfloat16).eval()
    for slice_tokens in arguments.slices:
        line = measured(model, slice_tokens or None, arguments)
        print(json.dumps({"slice_tokens": slice_tokens or None, **line}), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measured(model: Any, slice_tokens: int | None, arguments: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.RandomState(0)
    cache_bytes = 1 << 20 if arguments.tiny else 8 << 30
    limits = EngineLimits(max_running=arguments.streams + 1, slice_tokens=slice_tokens, cache_bytes=cache_bytes)
    engine = Engine(model, limits)
    engine.warm_up()
    whole = 40 if arguments.tiny else 1400, 2 if arguments.tiny else 7, 8 if arguments.tiny else 1100

    def request(new: int, shape: tuple[int, int, int]) -> Request:
        return Request(prompt(model.config, rng, *shape), SamplingParams(max_tokens=new, ignore_eos=True))

    for one in [request(2, whole) for _ in range(3)]:  # whatever is compiled at first use
        engine.add(one)
        while engine.active:
            engine.step()
    stream = request(12_000 if not arguments.tiny else 200, (64 if not arguments.tiny else 8, 0, 0))
    fresh = [request(arguments.new, whole) for _ in range(arguments.requests)]
    engine.add(stream)
    arrivals: list[float] = []
    ended = 0

    def step() -> None:
        nonlocal ended
        for one, event in engine.step():
            if one is stream:
                arrivals.append(time.perf_counter())
            elif not isinstance(event, Token):
                ended += 1

    for _ in range(20 if arguments.tiny else 200):
        step()
    quiet = np.diff(arrivals[5:]) * 1e3
    arrivals.clear()
    began, before, asked = time.perf_counter(), engine.tokens, 0
    while ended < len(fresh):
        while asked < len(fresh) and asked - ended < arguments.streams:
            engine.add(fresh[asked])
            asked += 1
        step()
    seconds = time.perf_counter() - began
    gaps = np.diff(arrivals) * 1e3
    engine.abort(stream)
    engine.step()
    return {
        "quiet_ms": round(statistics.median(quiet), 2),
        "gap_ms": [round(float(np.percentile(gaps, q)), 1) for q in (50, 99, 100)],
        "tokens_s": round((engine.tokens - before) / seconds),
        "requests_s": round(len(fresh) / seconds, 2),
    }


if __name__ == "__main__":
    main()
