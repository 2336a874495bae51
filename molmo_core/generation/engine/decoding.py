"""One more token for every answer in work: plainly, or by graphs that run ahead of what the host has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from molmo_core.generation.engine.graphs import DecodeGraphs
from molmo_core.generation.engine.paged import DecodeAttention, PagedCache
from molmo_core.generation.engine.points import Points
from molmo_core.generation.engine.scheduler import Sequence as Work
from molmo_core.nn.llm import Pass


class Decoder(Protocol):
    """Computes the newest tokens of sequences into their pages."""

    def step(self, sequences: Sequence[Work]) -> torch.Tensor:
        """Logits float32 [B, E] behind the newest token of each; valid until the next step."""

    def keep(self, sequences: Sequence[Work], tokens: torch.Tensor) -> None:
        """The newest tokens int64 [B] of sequences, which the host does not know yet."""


class PlainDecoder:
    """Anywhere: the tokens come from the host."""

    def __init__(self, model: Any, cache: PagedCache, points: Points | None = None):
        self.model, self.cache, self.points = model, cache, points
        self.device = next(model.parameters()).device

    def step(self, sequences: Sequence[Work]) -> torch.Tensor:
        tokens = np.array([sequence.tokens[-1] for sequence in sequences])
        positions = np.array([newest_position(sequence) for sequence in sequences])
        tables = np.zeros((len(sequences), max(len(sequence.pages) for sequence in sequences)), np.int32)
        for row, sequence in zip(tables, sequences):
            row[: len(sequence.pages)] = sequence.pages
        lengths = np.array([sequence.computed + 1 for sequence in sequences], np.int32)
        attention = DecodeAttention(self.cache, self._tensor(tables), self._tensor(lengths))
        x = self.model.embed_tokens(self._tensor(tokens)[:, None])
        x = x if self.points is None else self.points.fed(sequences, x)
        hidden = self.model.run(Pass(x, self._tensor(positions)[:, None]), attention).hidden[:, -1]
        logits = self.model.transformer.logits(hidden).float()
        return logits if self.points is None else self.points.allowed(sequences, hidden, logits)

    def keep(self, sequences: Sequence[Work], tokens: torch.Tensor) -> None:
        raise NotImplementedError("the tokens of a plain step come from the host")

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


class GraphDecoder:
    """The newest tokens stay on the device, so that a step can be launched before the host has read the last one's."""

    STAGES = 3
    """Host buffers in turn: what one holds may still be on its way when the next step is prepared."""

    def __init__(self, model: Any, cache: PagedCache, rows: int, pages: int):
        """`rows`: of the largest batch; `pages`: of the longest sequence."""
        self.graphs = DecodeGraphs(model, cache, rows, pages)
        self._newest = torch.zeros(rows, dtype=torch.int64, device=self.graphs.state.tokens.device)
        """By slot, of the answers whose newest token the host may not know."""
        pinned = self._newest.is_cuda
        self._staged = [torch.zeros(rows * (4 + pages), dtype=torch.int32, pin_memory=pinned) for _ in range(self.STAGES)]
        self._turn = 0

    def step(self, sequences: Sequence[Work]) -> torch.Tensor:
        state, size = self.graphs.state, self.graphs.size_of(len(sequences))
        self._turn = (self._turn + 1) % self.STAGES
        width = 4 + max(len(sequence.pages) for sequence in sequences)
        staged = self._staged[self._turn][: size * width].view(size, width)  # contiguous: else the copy would wait for the device
        array = staged.numpy()
        array[len(sequences) : size] = 0
        array[len(sequences) : size, 3] = 1  # padding has one token, in page 0
        for i, sequence in enumerate(sequences):
            row = array[i]
            row[0], row[1] = sequence.slot, sequence.tokens[-1]
            row[2], row[3] = newest_position(sequence), sequence.computed + 1
            row[4 : 4 + len(sequence.pages)] = sequence.pages
            row[4 + len(sequence.pages) :] = 0
        sent = staged.to(state.tokens.device, non_blocking=True)
        known = sent[:, 1].long()
        state.tokens[:size] = torch.where(known >= 0, known, self._newest[sent[:, 0].long()])
        state.positions[:size] = sent[:, 2].long()
        state.lengths[:size] = sent[:, 3]
        state.tables[:size, : width - 4] = sent[:, 4:]
        return self.graphs.run(len(sequences))

    def keep(self, sequences: Sequence[Work], tokens: torch.Tensor) -> None:
        slots = torch.tensor([sequence.slot for sequence in sequences])
        slots = slots.pin_memory() if tokens.is_cuda else slots
        self._newest[slots.to(tokens.device, non_blocking=True)] = tokens


def newest_position(sequence: Work) -> int:
    """Rotary position of the newest token of an answer."""
    return sequence.prompt.next_position + sequence.count - 1
