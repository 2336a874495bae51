"""How fast the engine generates: tokens a second with so many answers in work, time to first token, prompt tokens a second.

    python benchmarks/decode.py                       # on a GPU: Molmo2-4B, prompts of 1,400 tokens with a picture of 7 crops, bfloat16
    python benchmarks/decode.py --tiny                # on any CPU: checks the script

Decoding is timed while all answers are in work: from the step after the last prompt was read to the end of the first answer,
scheduling and sampling included. `bound` is what reading the weights and the cache once a token would take at 3.0 TB/s. Every line is one
JSON object; the first says what machine and versions these are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from shapes import model_config, prompt, random_model

from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.requests import Request, SamplingParams, Token

BANDWIDTH = 3.0e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", action="store_true", help="prompts without a picture")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-overlap", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"torch": torch.__version__, "device": name, "prompt": 60 if arguments.tiny else 1400}), flush=True)
    started = time.perf_counter()
    config = model_config(arguments.tiny)
    model = random_model(config, device, torch.float32 if arguments.tiny else torch.bfloat16).eval()
    loaded = time.perf_counter()
    batches = [1, 2] if arguments.tiny else arguments.batch
    limits = EngineLimits(max_running=max(batches), graphs=not arguments.no_graphs, overlap=not arguments.no_overlap)
    engine = Engine(model, limits)
    print(json.dumps({"load_s": round(loaded - started, 1)}), flush=True)
    start = time.perf_counter()
    engine.warm_up()
    print(json.dumps({"warm_up_s": round(time.perf_counter() - start, 1)}), flush=True)
    rng = np.random.RandomState(0)
    new = 8 if arguments.tiny else arguments.new
    for batch in batches:
        rounds = [measure(engine, config, rng, batch, new, arguments) for _ in range(arguments.rounds + 1)][1:]
        line = {key: round(statistics.median(r[key] for r in rounds), 4) for key in rounds[0]}
        line |= {"batch": batch, "text": arguments.text, "graphs": limits.graphs, "overlap": limits.overlap}
        if device.type == "cuda":
            line |= bound(model, batch, 1400 + new / 2, line["decode_tokens_s"])
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        print(json.dumps(line), flush=True)


def measure(
    engine: Engine, config: Any, rng: np.random.RandomState, batch: int, new: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """One round of fresh prompts."""
    length, crops, image_tokens = (60, 1, 20) if arguments.tiny else (1400, 7, 196 + 1080)
    crops = 0 if arguments.text else crops
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    requests = [Request(prompt(config, rng, length, crops, image_tokens), params) for _ in range(batch)]
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    first: dict[Request, float] = {}
    began, ended, tokens = 0.0, 0.0, 0
    while engine.active:
        if len(first) == batch and not began:
            began = time.perf_counter()
        for request, event in engine.step():
            if isinstance(event, Token):
                first.setdefault(request, time.perf_counter() - start)
                tokens += bool(began and not ended)
            elif not ended:
                ended = time.perf_counter()
    return {
        "decode_tokens_s": tokens / (ended - began),
        "first_token_s": statistics.median(first.values()),
        "prompt_tokens_s": batch * length / max(first.values()),
    }


def bound(model: Any, batch: int, tokens: float, rate: float) -> dict[str, float]:
    """Tokens a second if weights and cache were read once a token, and the share of it."""
    llm = model.config.llm
    weights = sum(p.nbytes for block in model.transformer.blocks for p in block.parameters()) + model.transformer.wte.embedding.nbytes
    cache = batch * tokens * 2 * llm.n_layers * llm.kv_heads * llm.head_width * 2
    best = batch * BANDWIDTH / (weights + cache)
    return {"bound_tokens_s": round(best), "share": round(rate / best, 3)}


if __name__ == "__main__":
    main()
