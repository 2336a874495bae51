"""Who computes what in the next step: admission, chunks of prompts, pages, preemption. Without torch."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from molmo_core.generation.engine.pages import PagePool
from molmo_core.generation.engine.requests import Request


class PromptRules(Protocol):
    """What planning has to know of a prompt."""

    whole: bool
    """It has to be computed in one piece."""

    @property
    def horizon(self) -> np.ndarray | None:
        """int64 [prompt]: the last token that each one or an earlier one sees; None: itself."""

    @property
    def keys(self) -> list[bytes]:
        """Of its full pages; empty: its pages are not shared."""


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request in work: its tokens, and how many of them are in the cache."""

    request: Request
    tokens: list[int]
    """Prompt and answer; the last one is not in the cache yet."""
    prompt_length: int
    prompt: Any
    """What is known of the prompt: `PromptRules`, and what the runner needs."""
    pages: list[int] = dataclasses.field(default_factory=list)
    """Another list whenever it is admitted."""
    computed: int = 0
    slot: int = -1
    """Its place on the device, one of `max_running`, while it runs."""

    @property
    def count(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.prompt_length


class Chunk(NamedTuple):
    """Tokens of a prompt to be computed in one step."""

    sequence: Sequence
    start: int
    end: int


class Plan(NamedTuple):
    """The work of a step."""

    prefill: list[Chunk]
    decode: list[Sequence]


class Scheduler:
    """Sequences that wait and that run. First come, first served; who came last is preempted first."""

    def __init__(self, pool: PagePool, max_running: int, prefill_tokens: int):
        """
        Args:
            pool: the pages.
            max_running: sequences in work at most.
            prefill_tokens: tokens of prompts that a step computes at most (a prompt that must not be cut may be longer).
        """
        self.pool, self.max_running, self.prefill_tokens = pool, max_running, prefill_tokens
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []
        self._slots = list(reversed(range(max_running)))
        self.preemptions = 0
        self.prompt_tokens = 0
        """Tokens of prompts that were taken into work, and of answers that are computed again."""
        self.prefix_tokens = 0
        """Those of them that were in the cache already."""

    @property
    def active(self) -> int:
        """Sequences that wait or run."""
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue.

        Raises:
            ValueError: it would never fit.
        """
        self.check(sequence)
        self.waiting.append(sequence)

    def check(self, sequence: Sequence) -> None:
        """Whether there will ever be room for a sequence.

        Raises:
            ValueError: it would never fit.
        """
        longest = sequence.prompt_length + sequence.request.params.max_tokens
        if self.pool.pages_for(longest) > self.pool.total:
            room = self.pool.total * self.pool.page_size
            raise ValueError(
                f"prompt and answer may be {longest:,} tokens, but the cache has room for {room:,}: lower max_tokens or the prompt"
            )

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, whether it waits or runs; its pages are free at once."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def plan(self, reading: bool = False) -> Plan:
        """What to compute next. Pages for it are reserved; `done` has to follow. `reading`: the prompts of an earlier plan are still being
        read, so no others are."""
        decode = []
        for sequence in list(self.running):
            wanted = sequence.count < sequence.request.params.max_tokens
            if sequence.slot >= 0 and wanted and self.is_decoding(sequence) and self._room_for_next(sequence):
                decode.append(sequence)
        prefill: list[Chunk] = []
        if not reading:
            prefill = self._continue_prompts()
            self._admit(prefill)
        return Plan(prefill, [s for s in decode if s.slot >= 0])

    def done(self, plan: Plan) -> None:
        """The plan was carried out: its tokens are in the cache, and full pages of prompts can be shared."""
        for sequence in plan.decode:
            sequence.computed += 1
        for sequence, start, end in plan.prefill:
            sequence.computed = end
            size = self.pool.page_size
            for number in range(start // size, min(end // size, len(sequence.prompt.keys))):
                self.pool.publish(sequence.pages[number], sequence.prompt.keys[number])

    def is_decoding(self, sequence: Sequence) -> bool:
        """Whether its prompt is in the cache and its next token is wanted."""
        return sequence.count > 0 and sequence.computed == len(sequence.tokens) - 1

    def _room_for_next(self, sequence: Sequence) -> bool:
        """A page for the next token, at the cost of those who came last; False: the sequence itself had to go."""
        while len(sequence.pages) * self.pool.page_size <= sequence.computed:
            if self.pool.available:
                sequence.pages += self.pool.take(1)
                continue
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue: it will be computed again, with what was generated so far."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
            sequence.slot = -1

    def _room(self, chunks: list[Chunk]) -> int:
        """Tokens that can be computed beside these chunks."""
        return max(0, self.prefill_tokens - sum(chunk.end - chunk.start for chunk in chunks))

    def _continue_prompts(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in self.running:
            if not self.is_decoding(sequence):
                chunk = self._chunk(sequence, self._room(chunks), bool(chunks))
                chunks += [chunk] if chunk.end > chunk.start else []
        return chunks

    def _admit(self, chunks: list[Chunk]) -> None:
        """Adds chunks of prompts that wait."""
        filling: set[bytes] = set()
        while self.waiting and len(self.running) < self.max_running and (room := self._room(chunks)):
            sequence = self.waiting[0]
            shared = self._shared_pages(sequence)
            missing = sequence.prompt.keys[len(shared) : len(shared) + 1]
            if missing and missing[0] in filling:
                break  # somebody computes this prefix in this very step: one step later it is in the cache
            needed = self.pool.pages_for(len(sequence.tokens)) - len(shared)
            # One page for each who runs, so that who was just admitted is not preempted in the next step.
            if needed + self.pool.unused(shared) + len(self.running) > self.pool.available:
                break
            self.waiting.popleft()
            self.pool.share(shared)
            sequence.pages = shared + self.pool.take(needed)
            sequence.computed = len(shared) * self.pool.page_size
            chunk = self._chunk(sequence, room, bool(chunks))
            if chunk.end == chunk.start:  # does not fit beside the others
                self._release(sequence)
                self.waiting.appendleft(sequence)
                break
            self.prompt_tokens += len(sequence.tokens)
            self.prefix_tokens += sequence.computed
            filling.update(sequence.prompt.keys[len(shared) :])
            sequence.slot = self._slots.pop()
            self.running.append(sequence)
            chunks.append(chunk)

    def _shared_pages(self, sequence: Sequence) -> list[int]:
        """Pages of the prompt's beginning that are in the cache; one token at least is left to compute."""
        most = (sequence.prompt_length - 1) // self.pool.page_size
        return self.pool.find(sequence.prompt.keys[:most])

    def _chunk(self, sequence: Sequence, budget: int, others: bool) -> Chunk:
        """The next tokens of a prompt: all that are left; or, if no other prompt is read in this step, as many as the budget takes,
        up to where no token sees one of the next chunk; or none."""
        start, end = sequence.computed, len(sequence.tokens)
        if end - start > budget:
            if others:
                return Chunk(sequence, start, start)
            end = self._cut(sequence, start, start + budget)
            if end == start:  # alone it may be longer
                end = self._cut_after(sequence, start + budget)
        return Chunk(sequence, start, end)

    def _cut(self, sequence: Sequence, start: int, end: int) -> int:
        """The last place <= end where the prompt may be cut; `start` if there is none."""
        while end > start and not self._may_cut(sequence, end):
            end -= 1
        return end

    def _cut_after(self, sequence: Sequence, end: int) -> int:
        """The first place >= end where the prompt may be cut."""
        while end < len(sequence.tokens) and not self._may_cut(sequence, end):
            end += 1
        return end

    def _may_cut(self, sequence: Sequence, place: int) -> bool:
        """No token before `place` sees one at or behind it."""
        horizon = sequence.prompt.horizon
        return not sequence.prompt.whole and (horizon is None or place > len(horizon) or int(horizon[place - 1]) < place)
