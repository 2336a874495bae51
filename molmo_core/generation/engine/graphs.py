"""The decoding step of a batch of one of a few sizes: on a GPU compiled blocks in one CUDA graph, elsewhere (tests) plain calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from molmo_core.generation.engine.blocks import Blocks
from molmo_core.generation.engine.paged import PagedCache, attend_pages
from molmo_core.nn.llm import Pass

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batches are padded to the next of these, with rows that write to page 0."""


@dataclasses.dataclass
class LayerAttention:
    """Attention of one new token a sequence over the pages of one layer: what a compiled block is handed."""

    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    pages: torch.Tensor
    """int64 [B, 1]: where the new tokens go."""
    offsets: torch.Tensor
    parts: int

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.keys[self.pages, :, self.offsets] = k.transpose(1, 2)
        self.values[self.pages, :, self.offsets] = v.transpose(1, 2)
        return attend_pages(q, self.keys, self.values, self.tables, self.lengths, self.parts)


class DecodeState:
    """What a step reads and writes on the device; row i of a batch is row i of every buffer."""

    def __init__(self, rows: int, pages: int, device: torch.device):
        """`pages`: of the longest sequence."""
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        """The newest token of each sequence; a step replaces it by the most probable next one."""
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        """Its rotary position; a step adds 1."""
        self.lengths = torch.ones(rows, dtype=torch.int32, device=device)
        """Tokens of the sequence, the newest included; a step adds 1."""
        self.tables = torch.zeros(rows, pages, dtype=torch.int32, device=device)


class DecodeGraphs:
    """The decoding step of a model, on a GPU captured for each size of a batch when it is first needed."""

    def __init__(self, model: Any, cache: PagedCache, rows: int, pages: int):
        self.model, self.cache = model, cache
        self.sizes = [size for size in SIZES if size < rows] + [rows]
        self.state = DecodeState(rows, pages, next(model.parameters()).device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None
        self._cuda = self.state.tokens.is_cuda
        self._blocks = Blocks(model, dynamic=None)
        self._head: Any = torch.compile(_head_step, dynamic=None) if self._cuda else _head_step

    def size_of(self, rows: int) -> int:
        """The size that a batch of so many rows is padded to."""
        return next(size for size in self.sizes if size >= rows)

    def run(self, rows: int) -> torch.Tensor:
        """One step of the first rows of the state; logits float32 [rows, E], valid until the next step."""
        size = self.size_of(rows)
        if not self._cuda:
            return self._step(size)[:rows]
        if size not in self._graphs:
            self.capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:rows]

    def capture(self, size: int) -> None:
        """Compiles (once for one row, once for several) and captures the step of a batch. The state is as it was afterwards."""
        state = self.state
        kept = [t.clone() for t in (state.tokens, state.positions, state.lengths, state.tables)]
        state.tables.zero_()  # nobody's page takes what is written meanwhile
        state.lengths.fill_(1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(size)
        self._pool = graph.pool()
        self._graphs[size] = graph, logits
        for tensor, value in zip((state.tokens, state.positions, state.lengths, state.tables), kept):
            tensor.copy_(value)

    def _step(self, size: int) -> torch.Tensor:
        state, model, cache = self.state, self.model, self.cache
        transformer = model.transformer
        tokens, positions, lengths, tables = (t[:size] for t in (state.tokens, state.positions, state.lengths, state.tables))
        last = (lengths - 1).long()[:, None]
        pages, offsets = tables.gather(1, last // cache.page_size).long(), last % cache.page_size
        parts = parts_of(size * transformer.config.kv_heads)

        def attention(layer: int) -> LayerAttention:
            return LayerAttention(cache.keys[layer], cache.values[layer], tables, lengths, pages, offsets, parts)

        x = self._blocks(Pass(model.embed_tokens(tokens[:, None]), positions[:, None]), attention)
        logits = self._head(transformer, x)
        tokens.copy_(logits.argmax(-1))
        positions.add_(1)
        lengths.add_(1)
        return logits


def parts_of(groups: int) -> int:
    """In how many parts the pages of each sequence are read, for so many pairs of sequence and key/value head: enough programs for
    all multiprocessors. One of three numbers, because blocks are compiled anew for each."""
    return 16 if groups <= 16 else 4 if groups < 256 else 1


def _head_step(transformer: Any, x: torch.Tensor) -> torch.Tensor:
    return transformer.logits(x[:, -1]).float()
