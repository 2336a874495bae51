"""Computes what the scheduler planned: embeds prompts, fills pages, gives logits. Knows the model, but no policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from molmo_core.generation.engine.blocks import blocks_of
from molmo_core.generation.engine.features import FeatureCache
from molmo_core.generation.engine.media import MediaEncoder
from molmo_core.generation.engine.paged import PagedCache, PromptAttention, PromptPart
from molmo_core.generation.engine.points import Points
from molmo_core.generation.engine.prompt import Prompt
from molmo_core.generation.engine.scheduler import Chunk
from molmo_core.generation.engine.scheduler import Sequence as Work
from molmo_core.generation.engine.slices import Slices, finish
from molmo_core.generation.engine.staging import to_device
from molmo_core.inputs import Inputs
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import Pass


class Runner:
    """A model, its pages and its features."""

    def __init__(self, model: Any, pages: int, page_size: int, feature_bytes: int, slots: int):
        """`pages`, `page_size`: of the cache; `feature_bytes`: of media that are kept; `slots`: answers in work at most."""
        parameter = next(model.parameters())
        self.model, self.device = model, parameter.device
        self.cache = PagedCache(model.config.llm, pages, page_size, parameter.dtype, self.device)
        self.media = MediaEncoder(model, FeatureCache(feature_bytes), self._tensor)
        self.points = Points(model, slots) if hasattr(model.config, "point_tokens") else None
        self._blocks = blocks_of(model, self.cache, dynamic=True)
        self._layers = len(model.transformer.blocks)

    def prompt(self, example: Mapping[str, Any]) -> Prompt:
        """A prompt of this model; nothing is computed on the device.

        Raises:
            ValueError: no token, or inputs of training.
        """
        return Prompt(example, self.model, self.cache.page_size)

    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Computes chunks of prompts into their pages; logits float32 [chunks, E] behind the last token of each."""
        return finish(self.slices(chunks, None))

    def slices(self, chunks: Sequence[Chunk], slice_tokens: int | None) -> Slices[torch.Tensor]:
        """The same with pauses, see `EngineLimits`. Until it has ended nothing else may be written to the pages of these prompts."""
        yield from self._embed([chunk.sequence for chunk in chunks if not _is_embedded(chunk.sequence)], slice_tokens)
        chunks = [chunk._replace(start=max(chunk.start, chunk.sequence.prompt.done)) for chunk in chunks]
        tokens = _packed([_part(chunk) for chunk in chunks])
        attention = self._attention(chunks, tokens.x.shape[1])
        ends = np.cumsum([chunk.end - chunk.start for chunk in chunks])
        last = self._tensor(ends - 1)
        layers = self._layers if slice_tokens is None else max(1, slice_tokens * self._layers // tokens.x.shape[1])
        hidden = yield from self._blocks.slices(tokens, attention, last if self.points is None else None, layers)
        for sequence, _, end in chunks:
            if end == len(sequence.tokens):
                sequence.prompt.embedded, sequence.prompt.done = None, 0
        if self.points is None:
            return self._blocks.logits(hidden)
        newest = hidden[last]
        for (sequence, start, end), stop in zip(chunks, ends.tolist()):
            self.points.read(sequence, start, hidden[stop - (end - start) : stop])
        return self.points.allowed([chunk.sequence for chunk in chunks], newest, self._blocks.logits(newest))

    def _embed(self, sequences: Sequence[Work], slice_tokens: int | None) -> Slices[None]:
        """Embeds prompts and answers; what the model has computed for good on the way goes to the pages."""
        features = yield from self.media.slices([sequence.prompt for sequence in sequences], slice_tokens)
        for sequence in sequences:
            prompt: Prompt = sequence.prompt
            cache = KVCache() if self.model.FILLS_CACHE and prompt.digest else None
            found = features.get(prompt.digest)
            embedded = self.model.embed(self._inputs(sequence), cache, lambda *_, found=found: found)
            if self.points is not None:
                self.points.embedded(sequence, embedded.kept.sources)
            prompt.done = 0 if cache is None else cache.length
            if cache is not None and prompt.done:
                pages, offsets = self._places([Chunk(sequence, 0, prompt.done)], prompt.done)
                for layer, (keys, values) in enumerate(cache):
                    self.cache.write(layer, pages, offsets, keys, values)
            prompt.embedded, prompt.pages = embedded.tokens._replace(valid=None, response=None), sequence.pages
            if slice_tokens is not None:
                yield

    def _inputs(self, sequence: Work) -> Inputs:
        """Inputs of the model for prompt and answer. Of the images only the shape: the features are there."""
        prompt: Prompt = sequence.prompt
        given: dict[str, Any] = {k: self._tensor(v)[None] for k, v in prompt.example.items() if k != "images"}
        if prompt.digest:
            given["images"] = torch.zeros((), dtype=torch.uint8, device=self.device).expand(1, *prompt.example["images"].shape)
        given |= {
            "input_ids": self._tensor(np.array(sequence.tokens))[None],
            "position_ids": self._tensor(positions_of(sequence))[None],
            "response_mask": self._tensor(np.arange(len(sequence.tokens)) >= sequence.prompt_length)[None],
        }
        targets = None if self.points is None else self.points.targets(sequence, prompt.example.get("point_target_ids"))
        if targets is not None:
            given["point_target_ids"] = self._tensor(targets)[None]
        return self.model.inputs(given)

    def _attention(self, chunks: Sequence[Chunk], rows: int) -> PromptAttention:
        pages, offsets = self._places(chunks, rows)
        if not self.cache.has_kernels:
            return PromptAttention(self.cache, pages, offsets, self._parts(chunks))
        from molmo_core.generation.engine.prompt_kernel import ROWS, PromptTables  # Triton is there with a GPU only

        blocks, row = [], 0
        tables = np.zeros((len(chunks), max(len(chunk.sequence.pages) for chunk in chunks)), np.int32)
        for number, (sequence, start, end) in enumerate(chunks):
            tables[number, : len(sequence.pages)] = sequence.pages
            for place in range(start, end, ROWS):
                stop = min(place + ROWS, end)
                blocks.append((number, row + place - start, stop - place, place, sequence.prompt.seen_until(stop - 1), start))
            row += end - start
        flags = np.concatenate([chunk.sequence.prompt.flags(chunk.start, chunk.end) for chunk in chunks])
        prompt_tables = PromptTables(*(self._tensor(t) for t in (np.array(blocks, np.int32), tables, flags)))
        return PromptAttention(self.cache, pages, offsets, (), prompt_tables, bool((flags >= 0).any()))

    def _parts(self, chunks: Sequence[Chunk]) -> list[PromptPart]:
        """Where the tokens of each chunk are and what they see, for attention without the kernel."""
        parts, row = [], 0
        for sequence, start, end in chunks:
            count = end - start
            layout = sequence.prompt.until(end)
            mask = None if layout.is_causal and not start else layout.dense_mask(1, end, count).to(self.device)
            pages = self._tensor(np.array(sequence.pages[: -(-end // self.cache.page_size)]))
            parts.append(PromptPart(slice(row, row + count), pages, end, mask))
            row += count
        return parts

    def _places(self, chunks: Sequence[Chunk], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and offsets int64 [1, rows] of the new tokens; padding goes to page 0."""
        size, row = self.cache.page_size, 0
        pages, offsets = np.zeros((2, 1, rows), np.int64)
        for sequence, start, end in chunks:
            place, to = np.arange(start, end), slice(row, row + end - start)
            pages[0, to] = np.asarray(sequence.pages)[place // size]
            offsets[0, to] = place % size
            row += end - start
        return self._tensor(pages), self._tensor(offsets)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)


def _is_embedded(sequence: Work) -> bool:
    prompt: Prompt = sequence.prompt
    return prompt.embedded is not None and prompt.pages is sequence.pages


def _part(chunk: Chunk) -> Pass:
    """What the blocks run over for a chunk, one row."""
    prompt: Prompt = chunk.sequence.prompt
    assert prompt.embedded is not None
    return prompt.embedded.part(chunk.start - prompt.done, chunk.end - prompt.done)


def _packed(parts: Sequence[Pass]) -> Pass:
    """The tokens of all parts in one row. At least two: a single token would be compiled for itself."""
    alone = sum(part.x.shape[1] for part in parts) == 1
    scaled = any(part.scale is not None for part in parts)

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([*tensors, tensors[0]] if alone else list(tensors), 1)

    scales = [torch.ones_like(p.x[..., 0], dtype=torch.float32) if p.scale is None else p.scale for p in parts] if scaled else []
    return Pass(joined([p.x for p in parts]), joined([p.positions for p in parts]), scale=joined(scales) if scaled else None)


def positions_of(sequence: Work) -> np.ndarray:
    """Rotary positions int64 of all tokens: those of the prompt as they were given, then one more for each."""
    prompt: Prompt = sequence.prompt
    return np.concatenate([prompt.positions, prompt.next_position + np.arange(sequence.count)])
