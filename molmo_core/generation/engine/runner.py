"""Computes what the scheduler planned: embeds prompts, fills pages, gives logits. Knows the model, but no policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from molmo_core.generation.engine.blocks import Blocks, compile_vision
from molmo_core.generation.engine.features import FeatureCache, media_digest
from molmo_core.generation.engine.paged import PagedCache, PromptAttention
from molmo_core.generation.engine.points import Points
from molmo_core.generation.engine.scheduler import Chunk
from molmo_core.generation.engine.scheduler import Sequence as Work
from molmo_core.nn.attention import Mask, SequenceLayout
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import Pass
from molmo_core.nn.sequence_layout import sequence_layout


@dataclasses.dataclass
class Prompt:
    """What the runner knows of a sequence."""

    example: dict[str, Any]
    """Inputs of the model (numpy), without metadata."""
    positions: np.ndarray
    """int64 [prompt]."""
    digest: bytes
    """Of the media; empty: there are none."""
    layout: SequenceLayout
    """Of the prompt, [1, prompt], on the CPU."""
    embedded: Pass | None = None
    """Of all tokens but the first `done`, one row, while the prompt is being computed."""
    done: int = 0
    """Tokens that embedding has computed into the pages already."""

    @property
    def next_position(self) -> int:
        """Rotary position of the first token of the answer."""
        return int(self.positions[-1]) + 1


class Runner:
    """A model, its pages and its features."""

    def __init__(self, model: Any, pages: int, page_size: int, feature_bytes: int):
        parameter = next(model.parameters())
        self.model, self.device = model, parameter.device
        self.cache = PagedCache(model.config.llm, pages, page_size, parameter.dtype, self.device)
        self.features = FeatureCache(feature_bytes)
        self.points = Points(model) if hasattr(model.config, "point_tokens") else None
        self._blocks = Blocks(model, dynamic=True)
        if parameter.is_cuda:
            compile_vision(model)

    # -- prompts --------------------------------------------------------------------------------------------------------

    def prompt(self, example: Mapping[str, Any]) -> Prompt:
        """Looks at the inputs of a prompt; nothing is computed on the device.

        Raises:
            ValueError: no token, or inputs of training.
        """
        example = {k: np.asarray(v) for k, v in example.items() if v is not None and k not in ("metadata", "labels", "loss_masks")}
        if "input_ids" not in example:
            raise ValueError("a prompt needs input_ids")
        ids = example["input_ids"] = example["input_ids"].astype(np.int64)
        if ids.ndim != 1 or not len(ids) or (ids < 0).any():
            raise ValueError(f"input_ids must be the tokens of one prompt without padding, got shape {ids.shape}")
        if "subsegment_ids" in example:
            raise ValueError("subsegment_ids mark message trees and packed examples; a prompt is one conversation")
        positions = example.setdefault("position_ids", np.arange(len(ids))).astype(np.int64)
        config = self.model.config
        layout = sequence_layout(torch.from_numpy(ids)[None], config.image_tokens, config.bi_directional_attn)
        return Prompt(example, positions, media_digest(example) if example.get("images") is not None else b"", layout)

    def horizon(self, prompt: Prompt) -> np.ndarray | None:
        """int64 [S]: the last token that each one or an earlier one sees; None: itself."""
        groups = prompt.layout.groups
        if groups is None:
            return None
        group = groups[0].numpy()
        last = np.arange(len(group))
        if prompt.layout.questions is not None:
            last[group >= 0] = len(group) - 1
        for number in np.unique(group[group >= 0]).tolist():
            members = np.flatnonzero(group == number)
            last[members] = np.maximum(last[members], members[-1])
        return np.maximum.accumulate(last)

    def first_medium(self, prompt: Prompt) -> int:
        """Index of the first token of a medium; the length of the prompt if there is none."""
        ids = prompt.example["input_ids"]
        media = np.isin(ids, self.model.config.image_tokens.all)
        return int(media.argmax()) if prompt.digest and media.any() else len(ids)

    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Computes chunks of prompts into their pages; logits float32 [chunks, E] behind the last token of each."""
        for chunk in chunks:
            if chunk.sequence.state.embedded is None:
                self._embed(chunk.sequence)
        chunks = [chunk._replace(start=max(chunk.start, chunk.sequence.state.done)) for chunk in chunks]
        longest = max(chunk.end - chunk.start for chunk in chunks)
        tokens = _padded([_part(chunk) for chunk in chunks], longest)
        attention = PromptAttention(self.cache, *self._places(chunks, longest), *self._past_and_mask(chunks, longest))
        hidden = self._blocks(_one_row(tokens), attention.of).unflatten(1, tokens.positions.shape)[0]
        for sequence, _, end in chunks:
            if end == len(sequence.tokens):
                sequence.state.embedded, sequence.state.done = None, 0
        last = self._tensor(np.array([chunk.end - chunk.start - 1 for chunk in chunks]))
        newest = hidden[torch.arange(len(chunks), device=self.device), last]
        logits = self.model.transformer.logits(newest).float()
        if self.points is None:
            return logits
        for row, (sequence, start, end) in zip(hidden, chunks):
            self.points.read(sequence, start, row[: end - start])
        return self.points.allowed([chunk.sequence for chunk in chunks], newest, logits)

    def _embed(self, sequence: Work) -> None:
        """Embeds prompt and answer; what the model has computed for good on the way goes to the pages."""
        prompt: Prompt = sequence.state
        given = {k: self._tensor(v)[None] for k, v in prompt.example.items()}
        answer = torch.tensor([[False] * sequence.prompt_length + [True] * sequence.count], device=self.device)
        given |= {
            "input_ids": self._tensor(np.array(sequence.tokens))[None],
            "position_ids": self._tensor(positions_of(sequence))[None],
            "response_mask": answer,
        }
        targets = None if self.points is None else self.points.targets(sequence)
        if targets is not None:
            given["point_target_ids"] = self._tensor(targets)[None]
        cache = KVCache() if self.model.FILLS_CACHE and prompt.digest else None

        def look(*arguments: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
            found = self.features.get(prompt.digest)
            if found is None:
                found = self.model.look(*arguments)
                self.features.put(prompt.digest, found)
            return found

        embedded = self.model.embed(self.model.inputs(given), cache, look)
        if self.points is not None:
            self.points.embedded(sequence, embedded.kept.sources)
        prompt.done = 0 if cache is None else cache.length
        if cache is not None and prompt.done:
            pages, offsets = self._places([Chunk(sequence, 0, prompt.done)], prompt.done)
            for layer, (keys, values) in enumerate(cache):
                self.cache.write(layer, pages, offsets, keys, values)
        prompt.embedded = embedded.tokens._replace(valid=None, response=None)

    def _places(self, chunks: Sequence[Chunk], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and offsets int64 [B, S] of the new tokens; padding goes to page 0."""
        size = self.cache.page_size
        pages, offsets = np.zeros((2, len(chunks), longest), np.int64)
        for i, (sequence, start, end) in enumerate(chunks):
            place = np.arange(start, end)
            pages[i, : end - start] = np.asarray(sequence.pages)[place // size]
            offsets[i, : end - start] = place % size
        return self._tensor(pages), self._tensor(offsets)

    def _past_and_mask(self, chunks: Sequence[Chunk], longest: int) -> tuple[torch.Tensor | None, Mask]:
        """Pages int64 [B, n] of what came before, and the mask over it and the new tokens."""
        rows, size = len(chunks), self.cache.page_size
        sizes = [chunk.end - chunk.start for chunk in chunks]
        layout = self._layout(chunks, longest) if any(c.sequence.state.layout.groups is not None for c in chunks) else None
        pasts = [chunk.start for chunk in chunks]
        if not any(pasts):
            if layout is None:  # causal: padding follows all real tokens, which do not see it
                return None, None
            return None, layout.mask(rows, longest, longest, self.device, "sdpa")
        most = -(-max(pasts) // size)
        tables = np.zeros((rows, most), np.int64)
        for i, (sequence, start, _) in enumerate(chunks):
            count = -(-start // size)
            tables[i, :count] = sequence.pages[:count]
        places = torch.arange(most * size, device=self.device)
        before = (places < self._tensor(np.array(pasts))[:, None])[:, None, None].expand(-1, -1, longest, -1)
        layout = layout or SequenceLayout(valid=self._tensor(np.arange(longest) < np.array(sizes)[:, None]))
        return self._tensor(tables), torch.cat((before, layout.dense_mask(rows, longest, longest, self.device)), -1)

    def _layout(self, chunks: Sequence[Chunk], longest: int) -> SequenceLayout:
        """The layout of the new tokens [B, S]: what is answered already is text, and no question that media look ahead to."""
        groups = torch.full((len(chunks), longest), -1)
        questions = None
        if any(chunk.sequence.state.layout.questions is not None for chunk in chunks):
            questions = torch.zeros(len(chunks), longest, dtype=torch.bool)
        valid = torch.zeros(len(chunks), longest, dtype=torch.bool)
        for i, (sequence, start, end) in enumerate(chunks):
            layout = sequence.state.layout
            stop = min(end, sequence.prompt_length)
            valid[i, : end - start] = True
            if layout.groups is not None and stop > start:
                groups[i, : stop - start] = layout.groups[0, start:stop]
            if questions is not None and layout.questions is not None and stop > start:
                questions[i, : stop - start] = layout.questions[0, start:stop]
        padded = bool((~valid).any())
        return SequenceLayout(
            valid.to(self.device) if padded else None,
            None,
            groups.to(self.device),
            None if questions is None else questions.to(self.device),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.require(array, requirements=("C", "W"))).to(self.device, non_blocking=True)


def _one_row(tokens: Pass) -> Pass:
    """[B, S] tokens as [1, B * S]."""
    return Pass(*(None if t is None else t.flatten(0, 1)[None] for t in tokens))  # type: ignore[arg-type]


def _part(chunk: Chunk) -> Pass:
    """What the blocks run over for a chunk, one row."""
    done, embedded = chunk.sequence.state.done, chunk.sequence.state.embedded
    return embedded.part(chunk.start - done, chunk.end - done)


def _padded(parts: Sequence[Pass], longest: int) -> Pass:
    """Rows of chunks, padded on the right."""

    def joined(tensors: Sequence[torch.Tensor | None], fill: float) -> torch.Tensor | None:
        given = next((t for t in tensors if t is not None), None)
        if given is None:
            return None
        result = given.new_full((len(tensors), longest, *given.shape[2:]), fill)
        for row, tensor in zip(result, tensors):
            if tensor is not None:
                row[: tensor.shape[1]] = tensor[0]
        return result

    x, positions = joined([p.x for p in parts], 0), joined([p.positions for p in parts], 0)
    assert x is not None
    assert positions is not None
    return Pass(x, positions, scale=joined([p.scale for p in parts], 1))


def positions_of(sequence: Work) -> np.ndarray:
    """Rotary positions int64 of all tokens: those of the prompt as they were given, then one more for each."""
    prompt: Prompt = sequence.state
    return np.concatenate([prompt.positions, prompt.next_position + np.arange(sequence.count)])
