"""Generates many answers at once: requests join and leave between two steps, their keys and values are in pages."""

from __future__ import annotations

import concurrent.futures
import logging
import operator
import time
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np
import torch

from molmo_core.generation.engine.answers import Answers, Launched
from molmo_core.generation.engine.blocks import POSITION_SHARE
from molmo_core.generation.engine.decoding import Decoder, GraphDecoder, PlainDecoder
from molmo_core.generation.engine.grammars import Grammars
from molmo_core.generation.engine.limits import EngineLimits
from molmo_core.generation.engine.paged import PagedCache
from molmo_core.generation.engine.pages import PagePool
from molmo_core.generation.engine.prompt_lookup import Speculation
from molmo_core.generation.engine.requests import EngineStats, Event, Failed, Request, SamplingParams, Token, TokenLogprobs
from molmo_core.generation.engine.runner import Runner
from molmo_core.generation.engine.sampler import Batch, Sampler, Scores, logprobs_of
from molmo_core.generation.engine.scheduler import Chunk, Plan, Scheduler, Sequence
from molmo_core.generation.engine.slices import Slices, finish, go_on
from molmo_core.generation.engine.staging import to_device

__all__ = ["Engine", "EngineLimits"]

logger = logging.getLogger(__name__)
GRAMMAR_WAIT_S = 0.02
"""How long a step waits for grammars if there is nothing else to do."""


class WarmUp(NamedTuple):
    """What `Engine.warm_up` took."""

    compile_s: float
    """To compile what reads prompts and draws tokens."""
    capture_s: float
    """To compile what decodes, and to capture it."""
    graphs: int
    """Sizes that were captured."""


class Reading(NamedTuple):
    """Chunks of prompts that are being read."""

    chunks: Items[Chunk]
    slices: Slices[torch.Tensor]
    """Gives their logits."""
    left: list[Sequence]
    """Those whose clients have left meanwhile: they are read with the others, who would have to wait anew whenever somebody leaves."""


class Engine:
    """A model and the answers in work. Not thread-safe: one thread calls `add`, `abort` and `step`."""

    def __init__(self, model: Any, limits: EngineLimits | None = None):
        """`model`: in eval mode, on its device.

        Raises:
            ValueError: no page fits into the cache, or the model cannot speculate.
        """
        limits = limits or EngineLimits()
        if limits.speculate and hasattr(model.config, "point_tokens"):
            raise ValueError("speculate: not for models that choose points, whose tokens depend on those before")
        self.limits, self.model = limits, model.eval()
        dtype = next(model.parameters()).dtype
        cache_bytes = _free(model.device) if limits.cache_bytes is None else limits.cache_bytes
        pages = cache_bytes // PagedCache.page_bytes(model.config.llm, limits.page_size, dtype)
        if pages < 1:
            raise ValueError(f"cache_bytes={cache_bytes}: not even one page of {limits.page_size} tokens fits")
        self.runner = Runner(model, pages, limits.page_size, limits.feature_bytes, limits.max_running)
        self.scheduler = Scheduler(PagePool(pages, limits.page_size), limits.max_running, limits.prefill_tokens)
        self.speculation: Speculation | None = None
        if limits.speculate:
            self.speculation = Speculation(limits.speculate, max(limits.max_running, 1 + limits.speculate), limits.page_size)
        self.decoder = self._decoder(pages)
        self.sampler = Sampler(limits.max_running, model.device)
        self._batch: tuple[list[Sequence], list[list[int]], Batch] | None = None
        """The last one: its sequences, and the pages that they had."""
        self._launched: list[Launched] = []
        self._reading: Reading | None = None
        self._grammars = Grammars(lambda: model.tokenizer)
        self._compiling: list[Sequence] = []
        """Those whose grammar is being compiled; nobody waits for them."""
        self._answers = Answers(model)

    @property
    def active(self) -> int:
        """Requests that wait or are in work."""
        return self.scheduler.active + len(self._compiling)

    @property
    def tokens(self) -> int:
        """Tokens generated so far."""
        return self._answers.tokens

    @property
    def running(self) -> int:
        """Requests in work."""
        return len(self.scheduler.running)

    def stats(self) -> EngineStats:
        """Numbers for whoever watches; any thread may ask."""
        scheduler, features = self.scheduler, self.runner.media.cache
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._compiling),
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
        """Puts a request into the queue; one with a grammar gets there when this is compiled, and fails if it is not valid.

        Raises:
            ValueError: it cannot be answered: inputs that do not fit, or more tokens than the cache or the model has room for.
        """
        params = request.params
        prompt, config = self.runner.prompt(request.example), self.model.config
        longest = len(prompt) + params.max_tokens
        if longest > config.llm.max_sequence_length:
            raise ValueError(f"prompt and answer may be {longest:,} tokens, but the model takes {config.llm.max_sequence_length:,}")
        if prompt.next_position + params.max_tokens > POSITION_SHARE * config.llm.max_sequence_length:
            raise ValueError(f"position_ids reach {prompt.next_position:,}, the model's sequences {config.llm.max_sequence_length:,}")
        if len(request.begun) >= params.max_tokens:
            raise ValueError(f"{len(request.begun)} tokens are generated already, max_tokens is {params.max_tokens}")
        sequence = Sequence(request, [*prompt.example["input_ids"].tolist(), *request.begun], len(prompt), prompt)
        self.scheduler.check(sequence)
        if params.grammar is None:
            self.scheduler.add(sequence)
        else:
            self._compiling.append(sequence)
        if self.runner.points is not None:
            places = (*request.begun_places, *[-1] * (len(request.begun) - len(request.begun_places)))
            self.runner.points.begin(sequence, prompt.example["input_ids"], places)
        self._answers.begin(sequence, None if params.grammar is None else self._grammars.compile(params.grammar))

    def abort(self, request: Request) -> None:
        """Nobody waits for the answer any more: its pages are free at once, or when those that are being read with it were read. Nothing
        happens if it has ended."""
        answer = self._answers.pop(request, None)
        if answer is None:
            return
        if answer.compiling is not None:
            answer.compiling.cancel()
            self._compiling.remove(answer.sequence)
        reading = self._reading
        if reading is None or all(chunk.sequence is not answer.sequence for chunk in reading.chunks):
            self._forget(answer.sequence)
            return
        reading.left.append(answer.sequence)
        if len(reading.left) == len(reading.chunks):
            self._drop_reading()

    def _forget(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if self.runner.points is not None:
            self.runner.points.end(sequence)

    def _drop_reading(self) -> None:
        """Prompts of those who wait for it are planned anew."""
        reading, self._reading = self._reading, None
        assert reading is not None
        for sequence in reading.left:
            self._forget(sequence)

    @torch.inference_mode()
    def warm_up(self, batches: Items[int] = ()) -> WarmUp:
        """Compiles what reads prompts and draws tokens, and captures the decoding of batches of these sizes (default: of all). Without
        this, those who first need it wait. Nothing to do on a CPU."""
        start = time.perf_counter()
        if self.model.device.type != "cuda":
            return WarmUp(0.0, 0.0, 0)
        if self.model.vision_backbone is not None:
            self.model.vision_backbone.blank_features(2)
        self.add(Request({"input_ids": np.zeros(2, np.int64)}, SamplingParams(max_tokens=1, ignore_eos=True, temperature=1.0)))
        while self.active:
            self.step()
        self._answers.tokens = self.scheduler.prompt_tokens = 0
        torch.cuda.synchronize()
        compiled, sizes = time.perf_counter(), []
        if isinstance(self.decoder, GraphDecoder):
            graphs = self.decoder.graphs
            sizes = sorted({graphs.size_of(batch) for batch in batches or graphs.sizes}, reverse=True)
            for size in sizes:
                graphs.capture(size)
        return WarmUp(compiled - start, time.perf_counter() - compiled, len(sizes))

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Event]]:
        """Reads prompts and computes one more token for every answer in work; what happened, in order."""
        events: list[tuple[Request, Event]] = []
        if self._compiling:
            self._admit_compiled(events)
        if self._launched and not self._may_run_ahead():
            self._read(events)
        plan = self.scheduler.plan(self._reading is not None)
        before, self._launched = self._launched, []
        if self._reading is not None and any(chunk.sequence.slot < 0 for chunk in self._reading.chunks):
            self._drop_reading()  # one was preempted, and its pages may be others' now
        if self._reading is not None or plan.prefill:
            self._prefill(plan.prefill, events, in_slices=bool(plan.decode) and self.limits.slice_tokens is not None)
        if plan.decode:
            self._decode(plan.decode, events)
        for launched in before:
            self._deliver(launched, events)
        return events

    def _admit_compiled(self, events: list[tuple[Request, Event]]) -> None:
        """Those whose grammar is ready wait for their turn from now on."""
        compiling = {sequence: self._answers[sequence.request].compiling for sequence in self._compiling}
        wait_s = 0 if self.scheduler.active else GRAMMAR_WAIT_S
        concurrent.futures.wait(filter(None, compiling.values()), wait_s, concurrent.futures.FIRST_COMPLETED)
        for sequence, future in compiling.items():
            if future is None or not future.done():
                continue
            self._compiling.remove(sequence)
            try:
                self._answers[sequence.request].take_grammar()
            except Exception as error:  # of whatever a grammar makes its library raise
                self._tell(sequence, [Failed(error)], events)
            else:
                self.scheduler.add(sequence)

    def _may_run_ahead(self) -> bool:
        """Whether the next step needs no token of the last one: pages enough that nobody is computed again, and nobody who asks the
        host."""
        running = self.scheduler.running
        return self.scheduler.pool.available >= len(running) and not any(sequence.request.params.needs_host for sequence in running)

    def _prefill(self, planned: Items[Chunk], events: list[tuple[Request, Event]], in_slices: bool = False) -> None:
        """Reads what is being read already, else what is planned: a slice of it, or all that is left."""
        now = time.monotonic()
        for chunk in planned:
            answer = self._answers[chunk.sequence.request]
            answer.started = answer.started or now
        reading, self._reading = self._reading or Reading(planned, self.runner.slices(planned, self.limits.slice_tokens), []), None
        chunks = reading.chunks
        try:
            logits = go_on(reading.slices) if in_slices else finish(reading.slices)
        except Exception as error:  # of whatever a prompt holds or the device raises: goes to its request, the others continue
            for sequence in reading.left:
                self._forget(sequence)
            chunks = [chunk for chunk in chunks if chunk.sequence not in reading.left]
            if len(chunks) == 1 == len(reading.chunks):
                self._tell(chunks[0].sequence, [Failed(error)], events)
                return
            # One by one, so that only the one at fault fails; prompts that were too large together just take longer.
            logger.warning("%d prompts could not be read together (%s: %s)", len(chunks), type(error).__name__, error)
            for chunk in chunks:
                self._prefill([chunk], events)
            return
        if logits is None:
            self._reading = reading
            return
        self.scheduler.done(Plan(list(chunks), []))
        for sequence in reading.left:
            self._forget(sequence)
        ready = [i for i, (sequence, _, end) in enumerate(chunks) if end == len(sequence.tokens) and sequence not in reading.left]
        if ready:
            finished = logits if len(ready) == len(chunks) else logits[to_device(np.array(ready), logits.device)]
            self._next(Scores.of(finished), [chunks[i].sequence for i in ready], events, first=True)

    def _decode(self, sequences: list[Sequence], events: list[tuple[Request, Event]]) -> None:
        proposed: list[list[int]] = []
        if self.speculation is not None:
            proposed = self.speculation.propose(sequences, [self._answers[sequence.request].lookup for sequence in sequences])
        try:
            scores = self.decoder.step(sequences, proposed)
        except Exception as error:  # of the device: nobody in this step can be helped
            logger.exception("A step of %d answers failed", len(sequences))
            for sequence in sequences:
                self._tell(sequence, [Failed(error)], events)
            return
        self.scheduler.done(Plan([], sequences))
        checked = torch.stack((scores.best, scores.finite.long()))[:, len(sequences) :].T.tolist() if any(proposed) else []
        self._next(Scores(*(t[: len(sequences)] for t in scores)), sequences, events)
        for sequence, tokens in zip(sequences, proposed):
            own, checked = checked[: len(tokens)], checked[len(tokens) :]
            self._accept(sequence, tokens, own, events)

    def _accept(self, sequence: Sequence, proposed: Items[int], following: Items[Items[int]], events: list[tuple[Request, Event]]) -> None:
        """Goes on with an answer as long as its newest token is what was proposed: what follows it is known then."""
        assert self.speculation is not None
        for token, known in zip(proposed, following):
            if sequence.request not in self._answers or sequence.tokens[-1] != token:
                return
            self.speculation.accepted += 1
            sequence.computed += 1
            sequence.tokens.append(known[0])
            self._give(sequence, sequence.count, known, events)

    def _next(self, scores: Scores, sequences: list[Sequence], events: list[tuple[Request, Event]], first: bool = False) -> None:
        """The next tokens: read at once, or when the next step was launched. `first`: of prompts."""
        batch = self._batch_of(sequences)
        wanted = [sequence.request.params.logprobs for sequence in sequences] if batch.needs_host else []
        raw = scores.logits.clone() if batch.changes and any(count is not None for count in wanted) else scores.logits
        tokens = self.sampler.choose(scores, batch)
        columns = [tokens, scores.finite.long()]
        if self.runner.points is not None:
            columns.append(self.runner.points.places(sequences, tokens))
        chosen = torch.stack(columns)
        if isinstance(self.decoder, GraphDecoder):
            if first or batch.changes or not batch.greedy:
                self.decoder.keep(sequences, tokens)
            if self.limits.overlap and self.speculation is None and not batch.needs_host:
                self._launched.append(Launched.of(sequences, chosen))
                return
        logprobs = logprobs_of(raw, tokens, wanted) if wanted else [None] * len(sequences)
        for sequence, known, own in zip(sequences, zip(*chosen.tolist()), logprobs):
            sequence.tokens.append(known[0])
            self._give(sequence, sequence.count, known, events, own)

    def _batch_of(self, sequences: list[Sequence]) -> Batch:
        """Their settings on the device, sent anew if they are others than in the last step."""
        if self._batch is not None and self._batch[0] == sequences and all(map(operator.is_, self._batch[1], _pages(sequences))):
            return self._batch[2]
        batch = self.sampler.batch([self._answers[sequence.request].row() for sequence in sequences])
        self._batch = list(sequences), _pages(sequences), batch
        return batch

    def _read(self, events: list[tuple[Request, Event]]) -> None:
        """Hands out the tokens of what was launched."""
        launched, self._launched = self._launched, []
        for one in launched:
            self._deliver(one, events)

    def _deliver(self, launched: Launched, events: list[tuple[Request, Event]]) -> None:
        for sequence, count, known in zip(launched.sequences, launched.counts, zip(*launched.read())):
            if sequence.request in self._answers:  # else it has ended, or was aborted
                sequence.tokens[sequence.prompt_length + count - 1] = known[0]
                self._give(sequence, count, known, events)

    def _give(self, sequence: Sequence, count: int, known: Items[int], events: list[Any], logprobs: TokenLogprobs | None = None) -> None:
        """Token number `count` of an answer is `known`: itself, whether its logits were numbers, if points are what it stands for."""
        token, finite, *place = known
        if self.runner.points is not None:
            self.runner.points.told(sequence, *place)
        self._tell(sequence, self._answers.give(sequence, count, token, bool(finite), logprobs, *place), events)

    def _tell(self, sequence: Sequence, happened: Items[Event], events: list[tuple[Request, Event]]) -> None:
        """Something happened to an answer, its end perhaps."""
        events += [(sequence.request, event) for event in happened]
        if not isinstance(happened[-1], Token):
            self.abort(sequence.request)

    def _decoder(self, pages: int) -> Decoder:
        model, cache, points, limits = self.model, self.runner.cache, self.runner.points, self.limits
        # Experts in float16 wait for the host, which a graph cannot.
        if limits.graphs and cache.has_kernels and (cache.keys[0].dtype == torch.bfloat16 or model.config.llm.block_type != "moe"):
            longest = -(-model.config.llm.max_sequence_length // limits.page_size)
            rows = limits.max_running if self.speculation is None else self.speculation.rows
            return GraphDecoder(model, cache, rows, min(longest, pages), points)
        return PlainDecoder(model, cache, points)


def _free(device: torch.device) -> int:
    """Bytes for the cache if nobody says how many: a GPU keeps a share for the activations of prompts."""
    return int(torch.cuda.mem_get_info(device)[0] * 0.85) if device.type == "cuda" else 1 << 30


def _pages(sequences: list[Sequence]) -> list[list[int]]:
    return [sequence.pages for sequence in sequences]
