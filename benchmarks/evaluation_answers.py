"""How evaluation answers on a CPU: batches that read what questions share once, and the engine, on the same records.

    python -m benchmarks.evaluation_answers --questions 12

A random model of the demo's size and pictures of 64 x 64; both ways give the same answers, which is checked.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from molmo_core.generation.engine.limits import EngineLimits
from molmo_core.models.base import BaseModelConfig
from pipelines.evaluation.generation import Answers, BatchAnswers, EngineAnswers

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("what", "is", "the", "color", "shape", "circle", "there", "red", "image", "a", "not", "in")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--questions", type=int, default=12, help="of a record")
    parser.add_argument("--tokens", type=int, default=6, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    overrides = [f"llm.tokenizer.identifier={ROOT / 'tests/golden/tokenizer'}", "llm.vocab_size=1024"]
    model = BaseModelConfig.load(ROOT / "configs/models/demo.yaml", overrides).build_model().eval()
    with torch.no_grad():
        for parameter in (*model.transformer.blocks.parameters(), *model.vision_backbone.parameters()):
            parameter.mul_(12.0 if parameter.ndim > 1 else 1.0)  # else all answers are the last token again and again
    preprocess = model.config.build_preprocessor(for_inference=True, is_training=False)
    random = np.random.RandomState(0)
    records = []
    for _ in range(given.records):
        picture = random.randint(0, 255, (64, 64, 3), np.uint8)
        asked = [" ".join(random.choice(WORDS, 7)) + "?" for _ in range(given.questions)]
        records.append([preprocess({"image": picture, "style": "demo", "question": question}) for question in asked])
    ways: dict[str, Callable[[], Answers]] = {"batches": lambda: BatchAnswers(model, given.tokens)}
    for page in (16, 64):
        limits = EngineLimits(page_size=page, cache_bytes=256 << 20)
        ways[f"engine, pages of {page}"] = functools.partial(EngineAnswers, model, given.tokens, limits)
    expected = list(ways["batches"]()(records))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, make in ways.items():
            way = make()  # a new one, which has seen none of the pictures
            start = time.process_time()
            found = list(way(records))
            seconds[name].append(time.process_time() - start)
            assert found == expected, name
    count = given.records * given.questions
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(
            f"{name:<22} {1e3 * middle / count:7.2f} ms CPU a question ({min(found):.2f} to {max(found):.2f} s for {count:,})", flush=True
        )


if __name__ == "__main__":
    main()
