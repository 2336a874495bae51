"""Greedy answers to the questions of records: on a GPU by the engine that also serves, on CPUs in batches that share what they read.

On CPUs the engine needs 1.2 times the CPU time for one question a picture and 2.4 times for twelve (benchmarks/evaluation_answers.py): it
prepares every prompt by itself and copies pages of keys and values at each step. `answering` reads what questions share once.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from molmo_core.generation.engine.engine import Engine
from molmo_core.generation.engine.limits import EngineLimits
from molmo_core.generation.engine.requests import Failed, Request, SamplingParams, Token
from molmo_core.generation.generate import answer_text
from pipelines.data.rejects import Rejected
from pipelines.evaluation.answering import answer

Example = dict[str, Any]
Answers = Callable[[Iterable[list[Example]]], Iterator["list[str] | Rejected"]]
"""From each record's prompts to their texts, in order; or why the model could not answer them."""
TOGETHER = 16
"""Records whose questions are answered in one batch on a CPU."""
FULL = 2
"""Prompts that an engine is given, for each answer that it has in work at most."""


def answers_of(model: Any, max_new_tokens: int) -> Answers:
    """What answers fastest where the model is."""
    return EngineAnswers(model, max_new_tokens) if model.device.type == "cuda" else BatchAnswers(model, max_new_tokens)


class BatchAnswers:
    """Answers the questions of some records at a time."""

    def __init__(self, model: Any, max_new_tokens: int):
        self.model, self.limit = model, max_new_tokens
        self._collate = model.config.build_collator(None, None, include_metadata=False)

    def __call__(self, records: Iterable[list[Example]]) -> Iterator[list[str]]:
        """The texts for each record's prompts, in order."""
        remaining = iter(records)
        while batch := list(itertools.islice(remaining, TOGETHER)):
            yield from answer(self.model, batch, self._collate, self.limit)


class EngineAnswers:
    """Keeps an engine full: prompts join as others end. The next ones are made in a thread meanwhile.

    Which prompts share a step depends on their order alone, so that the same records give the same answers.
    """

    def __init__(self, model: Any, max_new_tokens: int, limits: EngineLimits | None = None):
        self.model, self.params = model, SamplingParams(max_tokens=max_new_tokens)
        self.engine = Engine(model, limits)
        self.engine.warm_up()

    def __call__(self, records: Iterable[list[Example]]) -> Iterator[list[str] | Rejected]:
        waiting: collections.deque[list[_Answer]] = collections.deque()
        working: dict[Request, _Answer] = {}
        for prompts in _ahead(records):
            waiting.append([_Answer(prompt, self.params_of(prompt)) for prompt in prompts])
            for one in waiting[-1]:
                self._add(one, working)
            while self.engine.active >= FULL * self.engine.limits.max_running:
                self._step(working)
            while waiting and all(one.ended for one in waiting[0]):
                yield self._result(waiting.popleft())
        while self.engine.active:
            self._step(working)
        yield from map(self._result, waiting)

    def params_of(self, prompt: Example) -> SamplingParams:
        """How a prompt is answered: all alike here."""
        return self.params

    def _add(self, one: _Answer, working: dict[Request, _Answer]) -> None:
        try:
            self.engine.add(one.request)
        except ValueError as error:  # it is too long
            one.ended, one.error = True, error
        else:
            working[one.request] = one

    def _step(self, working: dict[Request, _Answer]) -> None:
        for request, event in self.engine.step():
            match event:
                case Token(token, _, place):
                    working[request].tokens.append(token)
                    working[request].places.append(place)
                case Failed(error):
                    one = working.pop(request)
                    one.ended, one.error = True, error
                case _:
                    working.pop(request).ended = True

    def _result(self, answers: list[_Answer]) -> list[str] | Rejected:
        for one in answers:
            if one.error is not None:
                return Rejected("model: cannot answer", str(one.error))
        return [answer_text(self.model, one.tokens, one.places, one.metadata) for one in answers]


class _Answer:
    """A prompt and its answer so far."""

    def __init__(self, prompt: Example, params: SamplingParams):
        self.metadata = prompt.get("metadata")
        self.request = Request(prompt, params)
        self.tokens: list[int] = []
        self.places: list[int] = []
        """What the tokens stand for, see `Token.place`."""
        self.ended = False
        self.error: Exception | None = None


def _ahead(records: Iterable[list[Example]]) -> Iterator[list[Example]]:
    """The same items, the next one made in a thread while this one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        iterator = iter(records)
        coming = thread.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, iterator, None)
            yield item
