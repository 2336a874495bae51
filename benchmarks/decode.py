"""How fast the engine generates: tokens a second with so many answers in work, time to first token, prompt tokens a second.

    python benchmarks/decode.py                       # on a GPU: Molmo2-4B, prompts of 1,400 tokens with a picture of 7 crops, bfloat16
    python benchmarks/decode.py --compare --peer      # and without graphs, without running ahead, and transformers' static cache
    python benchmarks/decode.py --profile             # and where a step's time goes
    python benchmarks/decode.py --float8              # and with weights in float8, and how often the most probable token is the same one
    python benchmarks/decode.py --speculate 4         # and with tokens proposed by prompt lookup
    python benchmarks/decode.py --tiny                # on any CPU: checks the script

Decoding is timed while all answers are in work: from the step after the last prompt was read to the end of the first answer,
scheduling and sampling included. `bound` is what reading the weights and the cache once a token would take at 3.0 TB/s. Every line is one
JSON object; the first says what machine and versions these are, the second what the start took: importing, loading (here: drawing random
weights), compiling, capturing graphs, and the first token of a prompt after that.

The line of `--float8` compares most probable tokens behind the same tokens: the model's own greedy answers to random prompts, fed token for
token to the same weights in float8, and (`again`) to the same model one answer at a time, whose kernels round differently. Logits of random
weights are flat, the second token close behind the first, so that rounding changes the first one far more often than in a trained model;
`agreement_clear` counts positions where the lead is more than other kernels change (see agreement.py). It says how the errors of float8
compare with those of bfloat16, not how well a trained model answers.

`--speculate` shows the two ends: `drawn`, answers of random weights, for which hardly a proposal is right; and `repeating`, the same with
embeddings so large that every token is followed by itself, so that all proposals are right but the first ones. `tokens_per_step` is of one
answer, over all of its steps. How many are right for a trained model depends on what it is asked; nothing here says.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from agreement import Reading, compared, read  # noqa: E402
from shapes import model_config, prompt, random_model  # noqa: E402

from molmo_core.generation.engine.decoding import GraphDecoder  # noqa: E402
from molmo_core.generation.engine.engine import Engine, EngineLimits  # noqa: E402
from molmo_core.generation.engine.quantization import quantise_blocks  # noqa: E402
from molmo_core.generation.engine.requests import Request, SamplingParams, Token  # noqa: E402
from molmo_core.nn.float8 import Float8Linear  # noqa: E402

BANDWIDTH = 3.0e12
ANSWERS = 16
"""Whose tokens are compared."""
IMPORTED = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", action="store_true", help="prompts without a picture")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--compare", action="store_true", help="one round also without running ahead, and without graphs")
    parser.add_argument("--peer", action="store_true", help="transformers' Molmo2 with a static cache, one round, batches up to 32")
    parser.add_argument("--profile", action="store_true", help="kernels and gaps of a step, for each batch")
    parser.add_argument(
        "--float8", action="store_true", help="in the end the same with weights in float8, and most probable tokens compared"
    )
    parser.add_argument("--speculate", type=int, default=0, metavar="K", help="then with so many proposed tokens at most, 0: not")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    if arguments.tiny:
        arguments.batch, arguments.new = [1, 2], 8
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    show({"torch": torch.__version__, "device": name, "prompt": length_of(arguments), "new": arguments.new})
    drawing = time.perf_counter()
    config = model_config(arguments.tiny)
    model = random_model(config, device, torch.float32 if arguments.tiny else torch.bfloat16).eval()
    loaded = time.perf_counter()
    engine = Engine(model, limits_of(arguments))
    warm = engine.warm_up()
    ready = time.perf_counter()
    rng = np.random.RandomState(0)
    first = measure(engine, config, rng, 1, 1, arguments)
    show(
        {
            "import_s": round(IMPORTED - STARTED, 1), "load_s": round(loaded - drawing, 1), "compile_s": round(warm.compile_s, 1),
            "capture_s": round(warm.capture_s, 1), "graphs": warm.graphs, "first_token_s": round(first["first_token_s"], 2),
            "cold_start_s": round(IMPORTED - STARTED + ready - drawing + first["first_token_s"], 1),
        }
    )  # fmt: skip
    rounds(engine, model, rng, arguments, arguments.rounds)
    profiles(engine, rng, arguments)
    if arguments.compare:
        for changes in ({"overlap": False}, {"graphs": False}):
            engine = None  # type: ignore[assignment]  # its pages are free before the next one counts
            free()
            engine = Engine(model, limits_of(arguments, **changes))
            engine.warm_up(arguments.batch)
            rounds(engine, model, rng, arguments, 1)
    if arguments.peer:
        engine = None  # type: ignore[assignment]
        free()
        peer(model, rng, arguments)
    if arguments.speculate:
        engine = None  # type: ignore[assignment]
        free()
        speculation(model, rng, arguments)
        free()
    if arguments.float8:
        engine = None  # type: ignore[assignment]
        free()
        float8(model, rng, arguments)


def float8(model: Any, rng: np.random.RandomState, arguments: argparse.Namespace) -> None:
    """The same measurements with weights in float8, and how often the most probable token is the same."""
    prompts = [request(model.config, rng, arguments, arguments.new + 2) for _ in range(ANSWERS)]
    positions, dtype = arguments.new, str(next(model.parameters()).dtype).removeprefix("torch.")

    def readings(first: Reading | None) -> list[Reading]:
        engine = Engine(model, limits_of(arguments, max_running=max(ANSWERS, *arguments.batch), overlap=False))
        engine.warm_up([1, ANSWERS])
        together = read(engine, prompts, positions, ANSWERS, first)
        return [together, read(engine, prompts, positions, 1, first or together)]

    first, again = readings(None)
    free()
    quantise_blocks(model)
    together, alone = readings(first)
    free()
    engine = Engine(model, limits_of(arguments))
    engine.warm_up()
    rounds(engine, model, rng, arguments, arguments.rounds)
    profiles(engine, rng, arguments)
    others = {f"float8, {ANSWERS} answers together": together, "float8, one at a time": alone}
    show({"compared": f"random weights, with {dtype}, {ANSWERS} answers together"} | compared(first, again, others))


def speculation(model: Any, rng: np.random.RandomState, arguments: argparse.Namespace) -> None:
    """With proposed tokens, of which hardly any are right, and nearly all."""
    engine = Engine(model, limits_of(arguments, speculate=arguments.speculate))
    engine.warm_up()
    embedding = model.transformer.wte.embedding.data
    kept = embedding.clone()
    rounds(engine, model, rng, arguments, arguments.rounds, {"speculate": arguments.speculate, "answers": "drawn"})
    embedding *= 100
    rounds(engine, model, rng, arguments, arguments.rounds, {"speculate": arguments.speculate, "answers": "repeating"})
    embedding.copy_(kept)


def limits_of(arguments: argparse.Namespace, **changes: Any) -> EngineLimits:
    return EngineLimits(**{"max_running": max(arguments.batch)} | changes)


def profiles(engine: Engine, rng: np.random.RandomState, arguments: argparse.Namespace) -> None:
    """Lines of `--profile`."""
    if arguments.profile and engine.model.device.type == "cuda":
        from step_profile import profile

        for batch in arguments.batch:
            show(profile(engine, [request(engine.model.config, rng, arguments, 64) for _ in range(batch)]))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def length_of(arguments: argparse.Namespace) -> int:
    return 60 if arguments.tiny else 1400


def request(config: Any, rng: np.random.RandomState, arguments: argparse.Namespace, new: int) -> Request:
    """A fresh prompt."""
    crops, image_tokens = (1, 20) if arguments.tiny else (7, 196 + 1080)
    example = prompt(config, rng, length_of(arguments), 0 if arguments.text else crops, image_tokens)
    return Request(example, SamplingParams(max_tokens=new, ignore_eos=True, temperature=arguments.temperature, seed=0))


def rounds(
    engine: Engine, model: Any, rng: np.random.RandomState, arguments: argparse.Namespace, count: int, about: dict[str, Any] | None = None
) -> None:
    """Medians of so many rounds for every batch, after one that does not count; `about`: more of what is measured."""
    graphs = isinstance(engine.decoder, GraphDecoder)
    for batch in arguments.batch:
        results = [measure(engine, model.config, rng, batch, arguments.new, arguments) for _ in range(count + 1)][1:]
        line: dict[str, Any] = {key: round(statistics.median(r[key] for r in results), 4) for key in results[0]}
        line |= {"batch": batch, "text": arguments.text, "graphs": graphs}
        line |= {"overlap": graphs and engine.limits.overlap and engine.speculation is None}
        line |= {"float8": isinstance(model.transformer.blocks[0].ff_out, Float8Linear)} | (about or {})
        if model.device.type == "cuda":
            line |= bound(model, batch, length_of(arguments) + arguments.new / 2, line["decode_tokens_s"])
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        show(line)


def measure(
    engine: Engine, config: Any, rng: np.random.RandomState, batch: int, new: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """One round of fresh prompts."""
    requests = [request(config, rng, arguments, new) for _ in range(batch)]
    given, accepted = engine.tokens, engine.speculation.accepted if engine.speculation else 0
    start = time.perf_counter()
    for one in requests:
        engine.add(one)
    first: dict[Request, float] = {}
    began, ended, tokens = 0.0, 0.0, 0
    while engine.active:
        if len(first) == batch and not began:
            began = time.perf_counter()
        for one, event in engine.step():
            if isinstance(event, Token):
                first.setdefault(one, time.perf_counter() - start)
                tokens += bool(began and not ended)
            elif not ended:
                ended = time.perf_counter()
    given, accepted = engine.tokens - given, engine.speculation.accepted - accepted if engine.speculation else 0
    return {
        "tokens_per_step": given / (given - accepted),
        "decode_tokens_s": tokens / (ended - began) if began and ended > began else 0.0,
        "first_token_s": statistics.median(first.values()),
        "prompt_tokens_s": batch * length_of(arguments) / max(first.values()),
    }


def bound(model: Any, batch: int, tokens: float, rate: float) -> dict[str, float]:
    """Tokens a second if weights and cache were read once a token, and the share of it."""
    llm = model.config.llm
    blocks = model.transformer.blocks
    weights = sum(t.nbytes for t in (*blocks.parameters(), *blocks.buffers())) + model.transformer.wte.embedding.nbytes
    cache = batch * tokens * 2 * llm.n_layers * llm.kv_heads * llm.head_width * 2
    best = batch * BANDWIDTH / (weights + cache)
    return {"bound_tokens_s": round(best), "share": round(rate / best, 3)}


def peer(model: Any, rng: np.random.RandomState, arguments: argparse.Namespace) -> None:
    """transformers' Molmo2 with the same weights: `generate` with a static cache, after one call that does not count."""
    import transformers
    from molmo2_parity import native_inputs, native_twin

    tokens, device = model.config.image_tokens, model.device
    twin = native_twin(model)
    for batch in arguments.batch:
        if batch > 32:
            continue
        each = []
        for _ in range(batch):
            example = request(model.config, rng, arguments, 1).example
            each.append(native_inputs({k: torch.from_numpy(v)[None].to(device) for k, v in example.items()}, (tokens.patch,)))
        inputs = {k: torch.cat([one[k] for one in each]) for k in each[0]}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(next(twin.parameters()).dtype)

        def seconds(new: int, inputs: dict[str, torch.Tensor] = inputs) -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                out = twin.generate(
                    **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, cache_implementation="static"
                )
            out.tolist()  # waits
            return time.perf_counter() - start

        seconds(arguments.new)
        first, whole = seconds(1), seconds(arguments.new)
        line: dict[str, Any] = {"peer": f"transformers {transformers.__version__}, static cache", "batch": batch, "text": arguments.text}
        line["peer_tokens_s"] = round(batch * (arguments.new - 1) / (whole - first), 1)
        show(line | {"first_token_s": round(first, 4), "prompt_tokens_s": round(batch * length_of(arguments) / first)})


if __name__ == "__main__":
    main()
