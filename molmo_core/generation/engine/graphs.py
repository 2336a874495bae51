"""The decoding step of a batch of one of a few sizes: on a GPU compiled blocks in one CUDA graph, elsewhere (tests) plain calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from molmo_core.generation.engine.blocks import FusedBlocks, blocks_of
from molmo_core.generation.engine.paged import PagedCache, Stored, attend_pages
from molmo_core.generation.engine.point_slots import PointSlots
from molmo_core.generation.engine.sampler import Scores
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


@dataclasses.dataclass
class StepAttention:
    """The same of all layers."""

    cache: PagedCache
    tables: torch.Tensor
    """int32 [B, n], in any layout: the pages of each sequence."""
    lengths: torch.Tensor
    """int32 [B]: its tokens, the new one included."""
    pages: torch.Tensor
    """int64 [B]: where the new tokens go."""
    offsets: torch.Tensor
    parts: int

    def of(self, layer: int) -> LayerAttention:
        """For a block."""
        where = self.tables, self.lengths, self.pages[:, None], self.offsets[:, None]
        return LayerAttention(self.cache.keys[layer], self.cache.values[layer], *where, self.parts)

    def stored(self, layer: int) -> Stored:
        """Where the keys and values of a layer go."""
        return Stored(self.cache.keys[layer], self.cache.values[layer], self.pages, self.offsets)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [B, H, D] -> [B, H · D]; k and v are stored already."""
        from molmo_core.generation.engine.decode_kernel import paged_attention  # Triton is there with a GPU only

        return paged_attention(q, self.cache.keys[layer], self.cache.values[layer], self.tables, self.lengths, self.parts).flatten(1)


class DecodeState:
    """What the steps read and write on the device."""

    def __init__(self, rows: int, pages: int, device: torch.device):
        """`pages`: of the longest sequence."""
        self.packet = torch.zeros((3 + pages) * rows, dtype=torch.int32, device=device)
        """What the host sends for a batch of n rows: an int32 [3 + pages, n] at its beginning, of slots, rotary positions, lengths (the
        newest token included), and the pages of each."""
        self.proposed = rows + 1
        self.newest = torch.zeros(2 * rows + 1, dtype=torch.int64, device=device)
        """The newest token of the answer in each slot; number `rows` is nobody's, and from number `proposed` on there are those that are
        proposed, by row."""


class DecodeGraphs:
    """The decoding step of a model, on a GPU captured for each size of a batch when it is first needed."""

    def __init__(self, model: Any, cache: PagedCache, rows: int, pages: int, points: PointSlots | None = None):
        self.model, self.cache, self.points = model, cache, points
        self._version = 0
        """Of what the points are chosen from, in the graphs."""
        self.sizes = [size for size in SIZES if size < rows] + [rows]
        self.state = DecodeState(rows, pages, next(model.parameters()).device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Scores]] = {}
        self._pool: Any = None
        self._cuda = self.state.packet.is_cuda
        self._blocks = blocks_of(model, cache, dynamic=None)

    def size_of(self, rows: int) -> int:
        """The size that a batch of so many rows is padded to."""
        return next(size for size in self.sizes if size >= rows)

    def run(self, rows: int) -> Scores:
        """One step of the rows that the packet describes, valid until the next one. The most probable token of each becomes its newest."""
        size = self.size_of(rows)
        if not self._cuda:
            return _first(self._step(size), rows)
        self._forget_outdated()
        if size not in self._graphs:
            self.capture(size)
        graph, scores = self._graphs[size]
        graph.replay()
        return _first(scores, rows)

    def capture(self, size: int) -> None:
        """Compiles (once for one row, once for several) and captures the step of a batch. The state is as it was afterwards."""
        self._forget_outdated()
        packet = self.state.packet
        kept = packet.clone()
        packet.zero_()  # nobody's page and slot take what is written meanwhile
        packet[:size] = self.sizes[-1]
        packet[2 * size : 3 * size] = 1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            scores = self._step(size)
        self._pool = graph.pool()
        self._graphs[size] = graph, scores
        packet.copy_(kept)

    def _forget_outdated(self) -> None:
        """Graphs with tensors of points that are others now."""
        if self.points is not None and self.points.version != self._version:
            torch.cuda.synchronize()  # the last step may still run
            self._graphs, self._pool, self._version = {}, None, self.points.version

    def _step(self, size: int) -> Scores:
        state, cache = self.state, self.cache
        columns = state.packet[: len(state.packet) // self.sizes[-1] * size].view(-1, size)
        slots, positions, lengths, tables = columns[0].long(), columns[1], columns[2], columns[3:].T
        x, pages, offsets = self._open(columns, slots)
        if self.points is not None:
            x = x + self.points.feed(slots, state.newest[slots]).to(x.dtype)
        attention = StepAttention(cache, tables, lengths, pages, offsets, parts_of(size * self.model.config.llm.kv_heads))
        hidden = self._blocks(Pass(x[:, None], positions[:, None]), attention)
        logits = self._blocks.logits(hidden)
        if self.points is not None:
            self.points.observe(slots, hidden, logits)
        scores = Scores.of(logits)
        state.newest.index_copy_(0, slots, scores.best)
        return scores

    def _open(self, columns: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B, d] of the newest tokens, pages and offsets int64 [B] of where they go."""
        newest, page = self.state.newest, self.cache.page_size
        if isinstance(self._blocks, FusedBlocks) and not getattr(self.model.config, "shared_low_high_embedding", False):
            from molmo_core.generation.engine.block_kernels import open_step  # Triton is there with a GPU only

            embedding = self.model.transformer.wte
            return open_step(columns, newest, embedding.embedding, embedding.new_embedding, page)
        last = (columns[2] - 1).long()
        pages = columns[3:].gather(0, last[None] // page)[0].long()
        return self.model.embed_tokens(newest[slots][:, None])[:, 0], pages, last % page


def _first(scores: Scores, rows: int) -> Scores:
    return Scores(*(t[:rows] for t in scores))


def parts_of(groups: int) -> int:
    """In how many parts the pages of each sequence are read, for so many pairs of sequence and key/value head: enough programs for
    all multiprocessors. One of three numbers, because blocks are compiled anew for each."""
    return 16 if groups <= 16 else 4 if groups < 256 else 1
