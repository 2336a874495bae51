"""Generates many answers at once: requests join and leave between two steps, their keys and values are in pages."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np
import torch

from molmo_core.generation.engine.decoding import Decoder, GraphDecoder, PlainDecoder
from molmo_core.generation.engine.grammars import Grammars, GrammarState
from molmo_core.generation.engine.paged import PagedCache
from molmo_core.generation.engine.pages import PagePool
from molmo_core.generation.engine.requests import End, EngineStats, Event, Failed, Request, SamplingParams, Times, Token, TokenLogprobs
from molmo_core.generation.engine.runner import Runner
from molmo_core.generation.engine.sampler import Row, choose, logprobs_of
from molmo_core.generation.engine.scheduler import Chunk, Plan, Scheduler, Sequence

logger = logging.getLogger(__name__)
UNKNOWN = -1
"""Stands for a token that was chosen on the device and not read yet."""


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """Sizes of an engine."""

    max_running: int = 64
    """Answers in work at once; others wait."""
    prefill_tokens: int = 8192
    """Tokens of prompts that a step reads at most, padding included, so that answers in work do not wait long."""
    cache_bytes: int | None = None
    """Memory for keys and values; None: on a GPU most of what is free, elsewhere 1 GiB."""
    feature_bytes: int = 256 << 20
    """Memory for the features of media that were seen already."""
    page_size: int = 64
    """Tokens of a page of the cache: a power of two of at least 16 on a GPU."""
    graphs: bool = True
    """On a GPU: decode by CUDA graphs."""
    overlap: bool = True
    """With graphs: launch a step before the tokens of the last one were read."""


class _Launched(NamedTuple):
    """A step whose tokens the host has not read."""

    sequences: list[Sequence]
    counts: list[int]
    """The number of each token in its answer, from 1."""
    tokens: torch.Tensor
    """int64 [2, B] on the host, once `ready`: tokens, and whether the row had numbers."""
    ready: torch.cuda.Event | None


@dataclasses.dataclass
class _Answer:
    """What the engine knows of a request."""

    sequence: Sequence
    seed: int
    grammar: GrammarState | None
    started: float | None = None
    """When a step first read its prompt."""


class Engine:
    """A model and the answers in work. Not thread-safe: one thread calls `add`, `abort` and `step`."""

    def __init__(self, model: Any, limits: EngineLimits | None = None):
        """`model`: in eval mode, on its device."""
        limits = limits or EngineLimits()
        self.limits, self.model = limits, model.eval()
        dtype = next(model.parameters()).dtype
        cache_bytes = _free(model.device) if limits.cache_bytes is None else limits.cache_bytes
        pages = cache_bytes // PagedCache.page_bytes(model.config.llm, limits.page_size, dtype)
        if pages < 1:
            raise ValueError(f"cache_bytes={cache_bytes}: not even one page of {limits.page_size} tokens fits")
        self.runner = Runner(model, pages, limits.page_size, limits.feature_bytes)
        self.scheduler = Scheduler(PagePool(pages, limits.page_size), limits.max_running, limits.prefill_tokens)
        self.decoder = self._decoder(pages)
        self._launched: list[_Launched] = []
        self.grammars = Grammars(lambda: model.tokenizer)
        self._answers: dict[Request, _Answer] = {}
        self.tokens = 0
        """Tokens generated so far."""

    @property
    def active(self) -> int:
        """Requests that wait or are in work."""
        return self.scheduler.active

    @property
    def running(self) -> int:
        """Requests in work."""
        return len(self.scheduler.running)

    def stats(self) -> EngineStats:
        """Numbers for whoever watches; any thread may ask."""
        scheduler, features = self.scheduler, self.runner.media.cache
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=scheduler.pool.used,
            pages_total=scheduler.pool.total,
            feature_bytes=features.bytes,
            tokens=self.tokens,
            prompt_tokens=scheduler.prompt_tokens,
            prefix_tokens=scheduler.prefix_tokens,
            preemptions=scheduler.preemptions,
            feature_hits=features.hits,
            feature_misses=features.misses,
        )

    def add(self, request: Request) -> None:
        """Puts a request into the queue.

        Raises:
            ValueError: it cannot be answered: inputs that do not fit, more tokens than the cache or the model has room for, or a
                grammar that is not valid.
        """
        params = request.params
        grammar = None if params.grammar is None else self.grammars.start(params.grammar)
        prompt, config = self.runner.prompt(request.example), self.model.config
        longest = len(prompt) + params.max_tokens
        if longest > config.llm.max_sequence_length:
            raise ValueError(f"prompt and answer may be {longest:,} tokens, but the model takes {config.llm.max_sequence_length:,}")
        if len(request.begun) >= params.max_tokens:
            raise ValueError(f"{len(request.begun)} tokens are generated already, max_tokens is {params.max_tokens}")
        if grammar is not None:
            for token in request.begun:
                grammar.push(token)
        sequence = Sequence(request, [*prompt.example["input_ids"].tolist(), *request.begun], len(prompt), prompt)
        self.scheduler.add(sequence)
        if self.runner.points is not None:
            places = (*request.begun_places, *[-1] * (len(request.begun) - len(request.begun_places)))
            self.runner.points.begin(sequence, prompt.example["input_ids"], places)
        self._answers[request] = _Answer(sequence, secrets.randbits(63) if params.seed is None else params.seed, grammar)

    def abort(self, request: Request) -> None:
        """Nobody waits for the answer any more: its pages are free at once. Nothing happens if it has ended."""
        answer = self._answers.pop(request, None)
        if answer is not None:
            self.scheduler.remove(answer.sequence)
            if self.runner.points is not None:
                self.runner.points.end(answer.sequence)

    @torch.inference_mode()
    def warm_up(self, batches: Items[int] = ()) -> None:
        """Compiles what reads prompts, and captures the decoding of batches of these sizes (default: of all). Without this, those who
        first need it wait. Nothing to do on a CPU."""
        if self.model.device.type != "cuda":
            return
        if self.model.vision_backbone is not None:
            self.model.vision_backbone.blank_features(2)
        self.add(Request({"input_ids": np.zeros(2, np.int64)}, SamplingParams(max_tokens=1, ignore_eos=True)))
        while self.active:
            self.step()
        self.tokens = self.scheduler.prompt_tokens = 0
        if isinstance(self.decoder, GraphDecoder):
            graphs = self.decoder.graphs
            for size in sorted({graphs.size_of(batch) for batch in batches or graphs.sizes}, reverse=True):
                graphs.capture(size)

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Event]]:
        """Reads prompts and computes one more token for every answer in work; what happened, in order."""
        events: list[tuple[Request, Event]] = []
        if self._launched and not self._may_run_ahead():
            self._read(events)
        plan = self.scheduler.plan()
        before, self._launched = self._launched, []
        if plan.prefill:
            self._prefill(plan.prefill, events)
        if plan.decode:
            self._decode(plan.decode, events)
        for launched in before:
            self._deliver(launched, events)
        return events

    def _may_run_ahead(self) -> bool:
        """Whether the next step needs no token of the last one: pages enough that nobody is computed again, and no logits to edit."""
        running = self.scheduler.running
        return self.scheduler.pool.available >= len(running) and not any(_needs_host(sequence.request) for sequence in running)

    def _prefill(self, chunks: Items[Chunk], events: list[tuple[Request, Event]]) -> None:
        now = time.monotonic()
        for chunk in chunks:
            answer = self._answers[chunk.sequence.request]
            answer.started = answer.started or now
        try:
            logits = self.runner.prefill(chunks)
        except Exception as error:  # of whatever a prompt holds or the device raises: goes to its request, the others continue
            if len(chunks) == 1:
                self._end(chunks[0].sequence, Failed(error), events)
                return
            # One by one, so that only the one at fault fails; prompts that were too large together just take longer.
            logger.warning("%d prompts could not be read together (%s: %s)", len(chunks), type(error).__name__, error)
            for chunk in chunks:
                self._prefill([chunk], events)
            return
        self.scheduler.done(Plan(list(chunks), []))
        ready = [i for i, chunk in enumerate(chunks) if chunk.end == len(chunk.sequence.tokens)]
        if ready:
            finished = logits if len(ready) == len(chunks) else logits[torch.tensor(ready, device=logits.device)]
            self._next(finished, [chunks[i].sequence for i in ready], events)

    def _decode(self, sequences: list[Sequence], events: list[tuple[Request, Event]]) -> None:
        try:
            logits = self.decoder.step(sequences)
        except Exception as error:  # of the device: nobody in this step can be helped
            logger.exception("A step of %d answers failed", len(sequences))
            for sequence in sequences:
                self._end(sequence, Failed(error), events)
            return
        self.scheduler.done(Plan([], sequences))
        self._next(logits, sequences, events)

    def _next(self, logits: torch.Tensor, sequences: list[Sequence], events: list[tuple[Request, Event]]) -> None:
        """The next tokens from logits [B, E]: at once, or when the next step was launched."""
        later = self.limits.overlap and isinstance(self.decoder, GraphDecoder)
        if later and not any(_needs_host(sequence.request) for sequence in sequences):
            self._launch(logits, sequences)
        else:
            self._choose(logits, sequences, events)

    def _choose(self, logits: torch.Tensor, sequences: list[Sequence], events: list[tuple[Request, Event]]) -> None:
        """Chooses the next tokens and hands them out."""
        rows = [self._row(sequence) for sequence in sequences]
        wanted = [row.params.logprobs for row in rows]
        raw = logits.clone() if any(count is not None for count in wanted) else logits
        choice = choose(logits, rows)
        logprobs = logprobs_of(raw, choice.tokens, wanted)
        tokens, finite = torch.stack((choice.tokens, choice.finite.long())).tolist()
        points = self.runner.points
        places = [-1] * len(tokens) if points is None else points.chosen(sequences, tokens)
        for i, sequence in enumerate(sequences):
            sequence.tokens.append(tokens[i])
            self._give(sequence, sequence.count, tokens[i], bool(finite[i]), logprobs[i], events, places[i])

    def _launch(self, logits: torch.Tensor, sequences: list[Sequence]) -> None:
        """Chooses the next tokens on the device; the host will read them later, and until then knows only that there is one."""
        choice = choose(logits, [self._row(sequence) for sequence in sequences])
        self.decoder.keep(sequences, choice.tokens)
        chosen, ready = torch.stack((choice.tokens, choice.finite.long())), None
        host = torch.empty(chosen.shape, dtype=torch.int64, pin_memory=chosen.is_cuda)
        host.copy_(chosen, non_blocking=True)
        if chosen.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        for sequence in sequences:
            sequence.tokens.append(UNKNOWN)
        self._launched.append(_Launched(list(sequences), [sequence.count for sequence in sequences], host, ready))

    def _read(self, events: list[tuple[Request, Event]]) -> None:
        """Hands out the tokens of what was launched."""
        launched, self._launched = self._launched, []
        for one in launched:
            self._deliver(one, events)

    def _deliver(self, launched: _Launched, events: list[tuple[Request, Event]]) -> None:
        if launched.ready is not None:
            launched.ready.synchronize()
        tokens, finite = launched.tokens.tolist()
        for i, sequence in enumerate(launched.sequences):
            if sequence.request in self._answers:  # else it has ended, or was aborted
                sequence.tokens[sequence.prompt_length + launched.counts[i] - 1] = tokens[i]
                self._give(sequence, launched.counts[i], tokens[i], bool(finite[i]), None, events)

    def _give(
        self,
        sequence: Sequence,
        count: int,
        token: int,
        finite: bool,
        logprobs: TokenLogprobs | None,
        events: list[tuple[Request, Event]],
        place: int = -1,
    ) -> None:
        """Hands out token number `count` of an answer, and its end."""
        if sequence.request.times is None:
            self._note_times(sequence)
        if not finite:
            self._end(sequence, Failed(ValueError("the model's logits are not numbers (its weights, or the numbers' range)")), events)
            return
        params, grammar = sequence.request.params, self._answers[sequence.request].grammar
        if grammar is not None:
            try:
                grammar.push(token)
            except ValueError as error:
                self._end(sequence, Failed(error), events)
                return
        self.tokens += 1
        if token in self._ends(params):
            self._end(sequence, End("stop"), events)
            return
        events.append((sequence.request, Token(token, logprobs, place)))
        if grammar is not None and grammar.complete:
            self._end(sequence, End("stop"), events)
        elif count == params.max_tokens:
            self._end(sequence, End("length"), events)

    def _note_times(self, sequence: Sequence) -> None:
        """Its first token is there."""
        request, started, now = sequence.request, self._answers[sequence.request].started, time.monotonic()
        if started is not None:
            request.times = Times(started - request.arrived, now - started, 0.0)

    def _row(self, sequence: Sequence) -> Row:
        params, answer = sequence.request.params, self._answers[sequence.request]
        return Row(params, sequence.tokens, sequence.prompt_length, answer.seed, self._ends(params), answer.grammar)

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end an answer."""
        endless = params.ignore_eos and params.grammar is None
        return params.stop_token_ids if endless else (self.model.tokenizer.eos_token_id, *params.stop_token_ids)

    def _end(self, sequence: Sequence, event: Event, events: list[tuple[Request, Event]]) -> None:
        events.append((sequence.request, event))
        self.abort(sequence.request)

    def _decoder(self, pages: int) -> Decoder:
        model, cache, limits = self.model, self.runner.cache, self.limits
        if self.runner.points is not None:  # what is fed back is chosen between two steps
            return PlainDecoder(model, cache, self.runner.points)
        # Experts in float16 wait for the host, which a graph cannot.
        if limits.graphs and cache.has_kernels and (cache.keys[0].dtype == torch.bfloat16 or model.config.llm.block_type != "moe"):
            longest = -(-model.config.llm.max_sequence_length // limits.page_size)
            return GraphDecoder(model, cache, limits.max_running, min(longest, pages))
        return PlainDecoder(model, cache)


def _free(device: torch.device) -> int:
    """Bytes for the cache if nobody says how many: a GPU keeps a share for the activations of prompts."""
    return int(torch.cuda.mem_get_info(device)[0] * 0.85) if device.type == "cuda" else 1 << 30


def _needs_host(request: Request) -> bool:
    """Whether choosing its next token needs the tokens before it, or gives more than a token."""
    params = request.params
    return params.edits_logits or params.logprobs is not None or params.grammar is not None
