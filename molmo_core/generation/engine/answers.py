"""The answers in work: whose tokens they are, when they end, and what is told of them."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence as Items
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from molmo_core.generation.engine.grammars import GrammarState
from molmo_core.generation.engine.prompt_lookup import PromptLookup
from molmo_core.generation.engine.requests import End, Event, Failed, Request, Times, Token, TokenLogprobs
from molmo_core.generation.engine.rows import Row
from molmo_core.generation.engine.scheduler import Sequence

UNKNOWN = -1
"""Stands for a token that was chosen on the device and not read yet."""


@dataclasses.dataclass
class Answer:
    """What is known of a request in work."""

    sequence: Sequence
    seed: int
    ends: tuple[int, ...]
    """Tokens that end it."""
    compiling: Future[GrammarState] | None
    """Its grammar, until the scheduler knows of it."""
    grammar: GrammarState | None = None
    started: float | None = None
    """When a step first read its prompt."""
    lookup: PromptLookup = dataclasses.field(default_factory=PromptLookup)

    def row(self) -> Row:
        """For choosing its next tokens, while it has this slot."""
        sequence = self.sequence
        return Row(
            sequence.request.params, sequence.tokens, sequence.prompt_length, self.seed, self.ends, self.grammar, sequence.slot,
            sequence.pages,
        )  # fmt: skip

    def take_grammar(self) -> None:
        """Its grammar is compiled: brings it to where the answer is.

        Raises:
            ValueError: it is not a grammar, or the tokens so far do not follow it.
        """
        compiling, self.compiling = self.compiling, None
        if compiling is not None:
            self.grammar = compiling.result()
            for token in self.sequence.request.begun:
                self.grammar.push(token)


class Launched(NamedTuple):
    """Tokens of a step that the host has not read."""

    sequences: list[Sequence]
    counts: list[int]
    """The number of each token in its answer, from 1."""
    tokens: torch.Tensor
    """int64 [2 or 3, B] on the host, once `ready`: tokens, whether the row had numbers, and what the tokens stand for."""
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, sequences: Items[Sequence], chosen: torch.Tensor) -> Launched:
        """Sends them, `tokens` on the device, to the host. Until they are there, it knows only that there is one more in each answer."""
        ready = None
        host = torch.empty(chosen.shape, dtype=torch.int64, pin_memory=chosen.is_cuda)
        host.copy_(chosen, non_blocking=True)
        if chosen.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        for sequence in sequences:
            sequence.tokens.append(UNKNOWN)
        return cls(list(sequences), [sequence.count for sequence in sequences], host, ready)

    def read(self) -> list[list[int]]:
        """The rows of `tokens`; waits for them."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.tokens.tolist()  # type: ignore[no-any-return]


class Answers(dict[Request, Answer]):
    """All of them, by request."""

    def __init__(self, model: Any):
        super().__init__()
        self._model = model
        self.tokens = 0
        """Generated so far."""

    def begin(self, sequence: Sequence, compiling: Future[GrammarState] | None) -> None:
        """One more."""
        params = sequence.request.params
        endless = params.ignore_eos and params.grammar is None
        ends = params.stop_token_ids if endless else (self._model.tokenizer.eos_token_id, *params.stop_token_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self[sequence.request] = Answer(sequence, seed, ends, compiling)

    def give(
        self, sequence: Sequence, count: int, token: int, finite: bool, logprobs: TokenLogprobs | None = None, place: int = -1
    ) -> list[Event]:
        """Token number `count` of an answer is known: what to tell; an `End` or `Failed` is the last of it."""
        request = sequence.request
        params, answer = request.params, self[request]
        if request.times is None and answer.started is not None:
            watch = sequence.prompt.looked
            seconds = 0.0 if watch is None else watch.seconds()
            request.times = Times(answer.started - request.arrived, time.monotonic() - answer.started, seconds)
        if not finite:
            return [Failed(ValueError("the model's logits are not numbers (its weights, or the numbers' range)"))]
        if answer.grammar is not None:
            try:
                answer.grammar.push(token)
            except ValueError as error:
                return [Failed(error)]
        self.tokens += 1
        if token in answer.ends:
            return [End("stop")]
        events: list[Event] = [Token(token, logprobs, place)]
        if answer.grammar is not None and answer.grammar.complete:
            events.append(End("stop"))
        elif count == params.max_tokens:
            events.append(End("length"))
        return events
