"""One more token for every answer in work: plainly, or by graphs that run ahead of what the host has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from molmo_core.generation.engine.graphs import DecodeGraphs
from molmo_core.generation.engine.paged import DecodeAttention, PagedCache
from molmo_core.generation.engine.points import Points
from molmo_core.generation.engine.sampler import Scores
from molmo_core.generation.engine.scheduler import Sequence as Work
from molmo_core.generation.engine.staging import to_device
from molmo_core.nn.llm import Pass


class Row(NamedTuple):
    """A token whose successor is computed."""

    sequence: Work
    ahead: int
    """Behind so many others of this step: 0 is the sequence's newest token, the others are proposed."""
    token: int


def _rows(sequences: Sequence[Work], proposed: Sequence[Sequence[int]]) -> list[Row]:
    """The newest tokens, then what is proposed for the first sequence, and so on."""
    rows = [Row(sequence, 0, sequence.tokens[-1]) for sequence in sequences]
    return rows + [Row(sequence, 1 + i, token) for sequence, tokens in zip(sequences, proposed) for i, token in enumerate(tokens)]


class Decoder(Protocol):
    """Computes the newest tokens of sequences into their pages."""

    def step(self, sequences: Sequence[Work], proposed: Sequence[Sequence[int]] = ()) -> Scores:
        """What follows the newest token of each; behind these rows, what follows each of the tokens that are proposed (a list for each
        sequence, or nothing at all: then the newest tokens need not be known to the host). Valid until the next step."""


class PlainDecoder:
    """Anywhere: the tokens come from the host."""

    def __init__(self, model: Any, cache: PagedCache, points: Points | None = None):
        self.model, self.cache, self.points = model, cache, points
        self.device = next(model.parameters()).device

    def step(self, sequences: Sequence[Work], proposed: Sequence[Sequence[int]] = ()) -> Scores:
        rows = _rows(sequences, proposed)
        tokens = np.array([row.token for row in rows])
        positions = np.array([row.sequence.prompt.next_position + row.sequence.count - 1 + row.ahead for row in rows])
        tables = np.zeros((len(rows), max(len(sequence.pages) for sequence in sequences)), np.int32)
        for pages, row in zip(tables, rows):
            pages[: len(row.sequence.pages)] = row.sequence.pages
        lengths = np.array([row.sequence.computed + 1 + row.ahead for row in rows], np.int32)
        attention = DecodeAttention(self.cache, to_device(tables, self.device), to_device(lengths, self.device))
        newest = to_device(tokens, self.device)
        x = self.model.embed_tokens(newest[:, None])
        x = x if self.points is None else self.points.fed(sequences, newest, x)
        hidden = self.model.run(Pass(x, to_device(positions, self.device)[:, None]), attention).hidden[:, -1]
        logits = self.model.transformer.logits(hidden).float()
        return Scores.of(logits if self.points is None else self.points.allowed(sequences, hidden, logits))


class GraphDecoder:
    """The newest tokens stay on the device, so that a step can be launched before the host has read the last one's."""

    STAGES = 3
    """Host buffers in turn: what one holds may still be on its way when the next step is prepared."""

    def __init__(self, model: Any, cache: PagedCache, rows: int, pages: int, points: Points | None = None):
        """`rows`: of the largest batch, proposed tokens included; `pages`: of the longest sequence."""
        self.graphs = DecodeGraphs(model, cache, rows, pages, None if points is None else points.slots)
        packet = self.graphs.state.packet
        self._device = packet.device
        self._staged = [torch.zeros(len(packet), dtype=torch.int32, pin_memory=packet.is_cuda) for _ in range(self.STAGES)]
        self._turn = 0
        self._table = np.zeros((3 + pages, rows), np.int32)
        """The packet of the last step, see `DecodeState`."""
        self._ahead = np.zeros(rows, np.int32)
        """Position less length of each row."""
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        """The pages of each row, as they belong to the sequence (another one has another list, and so has one that comes back)."""
        self._sent = [0] * rows
        """How many of them are in the table."""

    def step(self, sequences: Sequence[Work], proposed: Sequence[Sequence[int]] = ()) -> Scores:
        rows = _rows(sequences, proposed)
        count, size = len(rows), self.graphs.size_of(len(rows))
        for row, (sequence, ahead, _) in enumerate(rows):
            pages, slot = sequence.pages, self.graphs.state.proposed + row if ahead else sequence.slot
            if self._pages[row] is not pages or self._table[0, row] != slot:
                self._pages[row], self._sent[row] = pages, 0
                self._table[0, row] = slot
                self._ahead[row] = sequence.prompt.next_position - sequence.prompt_length - 1
            if self._sent[row] < len(pages):
                self._table[3 + self._sent[row] : 3 + len(pages), row] = pages[self._sent[row] :]
                self._sent[row] = len(pages)
        for row in range(count, size):  # padding has one token, in page 0
            self._pages[row], self._sent[row], self._ahead[row] = [], 0, -1
            self._table[[0, 3], row] = len(self._pages), 0
        lengths = self._table[2, :size]
        lengths[:count] = [sequence.computed + 1 + ahead for sequence, ahead, _ in rows]
        lengths[count:] = 1
        self._table[1, :size] = self._ahead[:size] + lengths
        self._send(size, 3 + max(self._sent[:count]))
        if proposed:
            slots, tokens = np.array([self._table[0, :count], [token for *_, token in rows]], np.int64)
            self.graphs.state.newest[to_device(slots, self._device)] = to_device(tokens, self._device)
        return self.graphs.run(count)

    def keep(self, sequences: Sequence[Work], tokens: torch.Tensor) -> None:
        """The newest tokens int64 [B] of sequences, if they are not the most probable ones of the last step."""
        slots = to_device(np.array([sequence.slot for sequence in sequences]), self._device)
        self.graphs.state.newest[slots] = tokens

    def _send(self, size: int, rows: int) -> None:
        """The first rows of the table; on a CPU all, because attention without the kernel looks at all of them."""
        packet = self.graphs.state.packet
        rows = rows if packet.is_cuda else len(self._table)
        self._turn = (self._turn + 1) % self.STAGES
        staged = self._staged[self._turn][: rows * size]
        np.copyto(staged.view(rows, size).numpy(), self._table[:rows, :size])
        packet[: rows * size].copy_(staged, non_blocking=True)
