"""Packing by lengths: how full the sequences are, and what deciding costs, beside the published algorithm on the same stream.

    .venv/bin/python benchmarks/packing.py                 # about three minutes
    .venv/bin/python benchmarks/packing.py --examples 1000

The published algorithm (Molmo2's training code) keeps a buffer, rounds lengths up to a grid of 1/512 of the sequence, and
empties the buffer by an exact two-dimensional knapsack over tokens and crops. Streams are drawn with the token counts that
this project's own tiling gives for random image sizes. Every example is packed, what is left in the buffer at the end too, so
nothing that is hard to place can be hidden there. `waits` is the longest that an example was overtaken, in examples.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from molmo_core.preprocessing.images import ImageSettings, image_token_counts
from molmo_core.preprocessing.packing import Packer

MOLMO2 = ImageSettings(
    crop_size=(378, 378), resize_mode="siglip", max_crops=8, use_single_crop_col_tokens=False, use_single_crop_start_token=True
)
BUDGETS = ((16384, 128), (16384, 192), (4096, 48))
BUFFER = 48
Lengths = tuple[np.ndarray, np.ndarray]
"""Tokens and crops of every example of a stream."""


class AnyPacker(Protocol):
    def add(self, item: int, tokens: int, crops: int) -> list[int] | None: ...

    def flush(self) -> list[list[int]]: ...


class KnapsackPacker:
    """The published algorithm."""

    def __init__(self, max_tokens: int, max_crops: int, buffer_size: int, text_weight: float = 1.0, image_weight: float = 30.0):
        self.max_tokens, self.max_crops, self.buffer_size = max_tokens, max_crops, buffer_size
        self.text_weight, self.image_weight = text_weight, image_weight
        self.grain = max(1, max_tokens // 512)
        self.buffer: list[tuple[int, int, int]] = []

    def add(self, item: int, tokens: int, crops: int) -> list[int] | None:
        if -(-tokens // self.grain) >= self.max_tokens // self.grain:  # fills a sequence by itself
            return [item]
        pack = self._take() if len(self.buffer) >= self.buffer_size else None
        self.buffer.append((item, tokens, crops))
        return pack

    def flush(self) -> list[list[int]]:
        packs = []
        while self.buffer:
            packs.append(self._take())
        return packs

    def _take(self) -> list[int]:
        rows, cols = self.max_tokens // self.grain, self.max_crops
        best = np.zeros((rows + 1, cols + 1))
        taken = []
        for _, tokens, crops in self.buffer:
            size = -(-tokens // self.grain)
            with_it = best[: rows + 1 - size, : cols + 1 - crops] + tokens * self.text_weight + crops * self.image_weight
            better = np.zeros(best.shape, bool)
            better[size:, crops:] = with_it > best[size:, crops:]
            best[size:, crops:] = np.maximum(best[size:, crops:], with_it)
            taken.append(better)
        chosen = set()
        for i in reversed(range(len(self.buffer))):
            if taken[i][rows, cols]:
                chosen.add(i)
                rows -= -(-self.buffer[i][1] // self.grain)
                cols -= self.buffer[i][2]
        pack = [self.buffer[i][0] for i in sorted(chosen)]
        self.buffer = [entry for i, entry in enumerate(self.buffer) if i not in chosen]
        return pack


def images(rng: np.random.Generator, n: int) -> np.ndarray:
    """Tokens and crops of n photographs of usual sizes and shapes, int64 [n, 2]."""
    widths = np.clip(rng.lognormal(6.8, 0.5, n), 200, 4000).astype(int)
    heights = np.clip(widths * rng.lognormal(-0.2, 0.3, n), 200, 4000).astype(int)
    return np.array([image_token_counts(h, w, MOLMO2) for h, w in zip(heights.tolist(), widths.tolist())])


def captions(rng: np.random.Generator, n: int) -> Lengths:
    """One photograph, one long caption."""
    image = images(rng, n)
    return image[:, 0] + np.clip(rng.lognormal(5.3, 0.35, n), 30, 900).astype(int), image[:, 1]


def vqa(rng: np.random.Generator, n: int) -> Lengths:
    """One photograph, several short questions (a message tree)."""
    image = images(rng, n)
    text = [rng.integers(8, 60, k).sum() + 20 for k in rng.geometric(0.25, n)]
    return image[:, 0] + np.array(text), image[:, 1]


def video(rng: np.random.Generator, n: int) -> Lengths:
    """Two frames a second, at most 128, 88 tokens each with their time, and some text."""
    frames = np.clip((rng.lognormal(3.2, 0.9, n) * 2).astype(int) + 1, 2, 128)
    return frames * 88 + np.clip(rng.lognormal(4.3, 1, n), 10, 1500).astype(int), frames


def text(rng: np.random.Generator, n: int) -> Lengths:
    """Conversations without media."""
    return np.clip(rng.lognormal(6, 1, n), 20, 8000).astype(int), np.zeros(n, int)


def mixture(rng: np.random.Generator, n: int) -> Lengths:
    """30 % captions, 40 % questions, 20 % videos, 10 % text."""
    parts = [captions(rng, n), vqa(rng, n), video(rng, n), text(rng, n)]
    which = rng.choice(4, n, p=[0.3, 0.4, 0.2, 0.1])
    return np.choose(which, [p[0] for p in parts]), np.choose(which, [p[1] for p in parts])


def measure(packer: AnyPacker, tokens: np.ndarray, crops: np.ndarray, budget: tuple[int, int]) -> str:
    """Packs a stream; a row of the table."""
    start = time.process_time()
    packs = [p for i in range(len(tokens)) if (p := packer.add(i, int(tokens[i]), int(crops[i])))]
    seconds = time.process_time() - start
    packs += packer.flush()
    order = [i for p in packs for i in p]
    if sorted(order) != list(range(len(tokens))) or any(tokens[p].sum() > budget[0] or crops[p].sum() > budget[1] for p in packs):
        raise SystemExit("an example was lost or a budget exceeded")
    used, used_crops = tokens.sum() / (len(packs) * budget[0]), crops.sum() / (len(packs) * budget[1])
    waits = max(place - i for place, i in enumerate(order))
    return f"{len(packs)} | {used:.2%} | {used_crops:.2%} | {1e3 * seconds / len(tokens):.3f} | {waits}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=6000, help="length of every stream")
    examples = parser.parse_args().examples
    streams: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
        "captions": captions,
        "questions": vqa,
        "video": video,
        "mixture": mixture,
    }
    print(f"{examples} examples a stream, buffer {BUFFER}. Tokens and crops: share of the budgets used.\n")
    print("| tokens, crops | stream | least packs possible | algorithm | packs | tokens | crops | CPU ms an example | waits |")
    print("|---|---|---|---|---|---|---|---|---|")
    for budget in BUDGETS:
        for name, stream in streams.items():
            tokens, crops = stream(np.random.default_rng(0), examples)
            fits = (tokens <= budget[0]) & (crops <= budget[1])
            tokens, crops = tokens[fits], crops[fits]
            least = int(np.ceil(max(tokens.sum() / budget[0], crops.sum() / budget[1])))
            packers: dict[str, AnyPacker] = {"published": KnapsackPacker(*budget, BUFFER), "ours": Packer(*budget, BUFFER)}
            for algorithm, packer in packers.items():
                print(
                    f"| {budget[0]}, {budget[1]} | {name} | {least} | {algorithm} | {measure(packer, tokens, crops, budget)} |", flush=True
                )


if __name__ == "__main__":
    main()
