"""What a client of the engine asks for, and what comes back: plain data, without torch."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer has to be, as text. One blank before it is allowed: models begin with the one that follows the role."""

    kind: Literal["json_schema", "regex", "choice"]
    text: str
    """A JSON schema (`{"type": "object"}` is any JSON object), a regular expression, or a JSON list of strings."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names and meanings are those of the OpenAI API and of vLLM.

    Raises:
        ValueError: a setting out of its range, by name.
    """

    max_tokens: int = 200
    """Tokens generated at most."""
    min_tokens: int = 0
    """No end token and no stop token before so many."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens only; 0 = all."""
    top_p: float = 1.0
    """Draw from the smallest set of most probable tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Draw from tokens at least so probable, relative to the most probable one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and answer."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer, once for each occurrence."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's end token; they are not part of it."""
    ignore_eos: bool = False
    """The model's end token does not end the answer (benchmarks)."""
    logprobs: int | None = None
    """Give the log-probability of each token, and of so many most probable ones."""
    seed: int | None = None
    """Makes the draw reproducible, whoever else is served; None = a fresh one."""
    grammar: Grammar | None = None
    """What the answer has to be, unless max_tokens or a stop token ends it before; the engine says if it is not valid."""

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "min_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "presence_penalty": -100 <= self.presence_penalty <= 100,
            "frequency_penalty": -100 <= self.frequency_penalty <= 100,
            "logit_bias": all(math.isfinite(value) for value in self.logit_bias.values()),
            "logprobs": self.logprobs is None or 0 <= self.logprobs <= 20,
        }
        for name in ("temperature", "repetition_penalty"):
            checks[name] = checks[name] and math.isfinite(getattr(self, name))
        wrong = [f"{name}={getattr(self, name)!r}" for name, good in checks.items() if not good]
        if wrong:
            raise ValueError(f"out of range: {', '.join(wrong)}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken. So small a temperature cannot be told from 0 in float32."""
        return self.temperature < 1e-5

    @property
    def penalises(self) -> bool:
        """Whether the logits depend on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def edits_logits(self) -> bool:
        """Whether the logits depend on what was generated, or on the request."""
        return self.penalises or bool(self.logit_bias) or self.min_tokens > 0

    @property
    def plain(self) -> bool:
        """Whether the model's most probable token is taken as it is, and nothing else is asked for."""
        return self.greedy and not self.edits_logits and not self.needs_host

    @property
    def needs_host(self) -> bool:
        """Whether choosing its next token needs the tokens before it on the host, or gives more than a token."""
        return self.logprobs is not None or self.grammar is not None


class Times(NamedTuple):
    """Where the time until the first token of an answer went, in seconds of the engine's process."""

    queue: float
    """From the request's arrival until the first step that read its prompt."""
    prefill: float
    """From there until the host had the first token."""
    vision: float
    """Of this, the device's work on media; 0: there are none, or they had been looked at before."""


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and how to answer it."""

    example: Mapping[str, Any]
    """Model inputs of the prompt, as a preprocessor gives them (numpy; without metadata)."""
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    begun: tuple[int, ...] = ()
    """Tokens of the answer that were generated elsewhere: it goes on behind them, and they count."""
    begun_places: tuple[int, ...] = ()
    """What each of these stands for (`Token.place`); missing at the end: text."""
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    """On the clock of `time.monotonic`."""
    times: Times | None = None
    """Set by the engine when it gives the first token."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the model, before temperature and filters."""

    token: float
    top: list[tuple[int, float]]
    """(token id, log-probability), most probable first."""


class Token(NamedTuple):
    """One more token of the answer."""

    id: int
    logprobs: TokenLogprobs | None = None
    place: int = -1
    """What it stands for, if it is a token of a point (MolmoPoint): image token, patch or cell; -1: it is text."""


class End(NamedTuple):
    """The answer is complete."""

    reason: str
    """`stop` (an end or stop token) or `length` (max_tokens)."""


class Failed(NamedTuple):
    """The request cannot be answered."""

    error: Exception


Event = Token | End | Failed


class EngineStats(NamedTuple):
    """Numbers of an engine: the first five as they are now, the others since its start."""

    running: int
    """Answers in work."""
    waiting: int
    """Requests before them."""
    pages_used: int
    """Pages of the cache that answers in work hold; what is kept for later prompts counts as free."""
    pages_total: int
    feature_bytes: int
    """Of the features of media that are kept."""
    tokens: int
    """Generated."""
    prompt_tokens: int
    """Of prompts that were taken into work; who was preempted counts again, with the answer so far."""
    prefix_tokens: int
    """Those of them that were in the cache already."""
    preemptions: int
    feature_hits: int
    """Prompts whose media had been seen."""
    feature_misses: int
