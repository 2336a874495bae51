"""Log-probabilities in OpenAI's form."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from molmo_core.generation.engine.requests import TokenLogprobs
from molmo_core.preprocessing.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for a probability of 0, whose logarithm JSON cannot hold."""


class LogprobWriter:
    """Writes log-probabilities with the texts of their tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = functools.lru_cache(1 << 16)(tokenizer.token_bytes)

    def text(self, token: int) -> str:
        """The text of a token: a replacement character where it is a part of a character, its name where it has none."""
        return self._bytes(token).decode("utf-8", "replace") or self._tokenizer.id_to_token(token)

    def content(self, tokens: Sequence[tuple[int, TokenLogprobs]], no_bytes: list[int] | None = None) -> list[dict[str, Any]]:
        """`logprobs.content` of chat completions, and `logprobs` of responses.

        Args:
            no_bytes: what stands for those of a token without text.
        """

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self.text(token), "logprob": max(logprob, LEAST), "bytes": list(self._bytes(token)) or no_bytes}

        return [{**entry(token, of.token), "top_logprobs": [entry(*one) for one in of.top]} for token, of in tokens]
