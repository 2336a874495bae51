"""Choosing the next token from logits: greedy, temperature, top-k and nucleus sampling."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import torch

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: logits divided by them leave what float32 holds, and nothing but the most probable token is drawn."""
EVEN_ABOVE = 1e30
"""Temperatures above change nothing any more: every token is as probable as the next."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. The same settings apply to every row of a batch."""

    do_sample: bool = False
    """False: the most probable token (the other settings then have no effect)."""
    temperature: float = 1.0
    """Logits are divided by it; below `GREEDY_BELOW` it means greedy."""
    top_p: float = 1.0
    """Nucleus: the smallest set of most probable tokens whose probabilities sum to at least this; 1 = all."""
    top_k: int | None = None
    """Only the k most probable tokens; None or 0 = all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0 = greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be positive (None = no limit)")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < GREEDY_BELOW


def filter_logits(logits: torch.Tensor, top_p: float = 1.0, top_k: int | None = None) -> torch.Tensor:
    """Sets the logits of excluded tokens to -inf.

    Args:
        logits: [B, E], already divided by the temperature.
        top_p: nucleus mass, applied to what top-k leaves; the most probable token always stays.
        top_k: tokens kept; ties at the limit stay.
    """
    if top_k and top_k < logits.shape[-1]:
        limit = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < limit, -torch.inf)
    if top_p < 1:
        ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)  # probability mass of the more probable tokens
        beyond = before >= top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, indices, beyond), -torch.inf)
    return logits


def seeded(device: torch.device | str, seed: int | None) -> torch.Generator:
    """A generator for a 64-bit seed (signed or not; None: one that nobody knows).

    On CPUs torch uses the lower 32 bits of a seed only, so the upper ones are mixed into them: seeds that differ draw differently.
    """
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
        return generator
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    mixed = int.from_bytes(hashlib.blake2b(high.to_bytes(4), digest_size=4).digest()) if high else 0  # small seeds stay what they are
    return generator.manual_seed(low ^ mixed)


def next_token(logits: torch.Tensor, config: SamplingConfig, generator: torch.Generator | None = None) -> torch.Tensor:
    """The chosen token of each row, [B] int64.

    Args:
        logits: [B, E] float32; -inf excludes a token.
        generator: source of randomness on the logits' device (None: torch's default one).
    """
    if config.greedy:
        return logits.argmax(-1)
    filtered = filter_logits(logits / min(config.temperature, EVEN_ABOVE), config.top_p, config.top_k)
    return torch.multinomial(filtered.softmax(-1), num_samples=1, generator=generator).squeeze(-1)
