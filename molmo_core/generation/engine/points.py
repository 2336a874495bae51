"""The points of the answers in work (MolmoPoint), as the host knows them: what their prompts show, and where they have pointed.

What is chosen, and from what, is on the device (`point_slots.py`); the host reads the places with the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from molmo_core.generation.engine.point_slots import PointSlots
from molmo_core.generation.engine.scheduler import Sequence as Work
from molmo_core.generation.engine.staging import to_device
from molmo_core.generation.point_state import CELL, PATCH, TEXT, TOKEN, PointRows
from molmo_core.nn.pointing import PointSources
from molmo_core.tokens import NO_MORE_POINTS


@dataclasses.dataclass
class _Answer:
    """What is known of the points of one answer."""

    places: list[int]
    """Of each of its tokens: what it stands for, -1: it is text."""
    image_tokens: np.ndarray
    """int64 [M], their positions in the prompt."""
    sources: PointSources | None = None
    states: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Hidden states (normed) of the image tokens that were read so far, each [n, d], by where the chunk began."""
    entries: np.ndarray | None = None
    """int64 [M]: where its image tokens are among those of all, once they are."""
    begin: PointRows | None = None
    """Where it was behind its prompt, int64 [1] each."""


class Points:
    """The points of all answers of an engine."""

    def __init__(self, model: Any, slots: int):
        """`slots`: answers in work at most."""
        self.slots = PointSlots(model, slots)
        self._model, ids = model, model.config.point_tokens
        self._columns = [ids.token, ids.patch, ids.cell]
        self._answers: dict[Work, _Answer] = {}

    def begin(self, sequence: Work, ids: np.ndarray, places: Iterable[int]) -> None:
        """A sequence whose prompt has these ids; `places`: of tokens of its answer that were generated elsewhere."""
        tokens = self._model.config.image_tokens
        self._answers[sequence] = _Answer(list(places), np.flatnonzero(np.isin(ids, (tokens.patch, tokens.low))))

    def told(self, sequence: Work, place: int) -> None:
        """What the next token of its answer stands for, -1: it is text."""
        self._answers[sequence].places.append(place)

    def end(self, sequence: Work) -> None:
        """Forgets it."""
        answer = self._answers.pop(sequence, None)
        if answer is not None and answer.entries is not None:
            self.slots.release(answer.entries)

    def targets(self, sequence: Work, prompt: np.ndarray | None) -> np.ndarray | None:
        """`point_target_ids` int64 [n, 3] of the prompt and the answer so far, given those of the prompt."""
        rows: list[list[int]] = [] if prompt is None else prompt.tolist()
        answer = self._answers[sequence]
        for token, place in zip(sequence.tokens[sequence.prompt_length :], answer.places):
            if place >= 0:
                column = self._columns.index(token)
                if column == 0:
                    rows.append([-1, -1, -1])
                rows[-1][column] = place
        return np.array(rows, np.int64) if rows else None

    def embedded(self, sequence: Work, sources: PointSources) -> None:
        """What its prompt can point at."""
        answer = self._answers[sequence]
        if answer.entries is None and len(answer.image_tokens):
            answer.sources = sources

    def read(self, sequence: Work, start: int, hidden: torch.Tensor) -> None:
        """Tokens of a prompt from `start` on were computed: hidden [n, d] behind the last block."""
        answer = self._answers[sequence]
        if answer.sources is not None:
            if start == 0:
                answer.states = {}  # it had been preempted
            places = answer.image_tokens
            here = places[(places >= start) & (places < start + len(hidden))] - start
            answer.states[start] = self._model.point_predictor.normed(hidden[to_device(here, hidden.device)])
        if start + len(hidden) == len(sequence.tokens):
            self._complete(sequence, answer, hidden.device)

    def allowed(self, sequences: Sequence[Work], hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, E] of what may follow the newest tokens, whose hidden states are [B, d]; those that are given are changed."""
        self.slots.observe(self._slots_of(sequences, hidden.device), hidden, logits)
        return logits

    def places(self, sequences: Sequence[Work], tokens: torch.Tensor) -> torch.Tensor:
        """What the next tokens int64 [B] stand for, int64 [B], -1: they are text."""
        return self.slots.places(self._slots_of(sequences, tokens.device), tokens)

    def fed(self, sequences: Sequence[Work], tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, 1, d] of the newest tokens int64 [B], with what they stand for."""
        return x + self.slots.feed(self._slots_of(sequences, x.device), tokens)[:, None].to(x.dtype)

    def _complete(self, sequence: Work, answer: _Answer, device: torch.device) -> None:
        """All was read: it has its slot. Who is read again, because it had been preempted, has its image tokens still."""
        if answer.sources is not None:
            x = torch.cat([answer.states[start] for start in sorted(answer.states)])[None]
            if answer.entries is None:
                answer.entries = self.slots.take(x.shape[1], answer.sources.present.shape[2])
            self.slots.fill(to_device(answer.entries, device), answer.sources, x)
        if answer.begin is None:
            home = torch.zeros(1, dtype=torch.int64, device=device)
            candidates = len(answer.image_tokens) + self._model.config.no_more_points_class
            answer.begin = PointRows.begin(home, candidates, answer.sources)
        answer.sources, answer.states = None, {}
        known = self._behind(sequence, answer)
        rows = answer.begin._replace(**{name: torch.full_like(answer.begin.home, value) for name, value in known.items()})
        self.slots.begin(sequence.slot, rows, None if answer.entries is None else to_device(answer.entries, device))

    def _behind(self, sequence: Work, answer: _Answer) -> dict[str, int]:
        """Where it is behind the tokens of its answer that are there already, see `PointRows`."""
        known = {"home": sequence.slot, "started": int(sequence.count > 0)}
        if answer.entries is None:
            return known
        token = before = slot = -1
        kind = TEXT
        for identifier, place in zip(sequence.tokens[sequence.prompt_length :], answer.places):
            kind = (TOKEN, PATCH, CELL)[self._columns.index(identifier)] if place >= 0 else TEXT
            if kind == TOKEN and place == NO_MORE_POINTS:
                known["ended"] = 1
            elif kind == TOKEN:
                before, token = token, place
            elif kind == PATCH:
                slot = place
        entry = int(answer.entries[max(token, 0)])
        return {**known, "kind": kind, "token": token, "entry": entry, "before": before, "slot": slot}

    def _slots_of(self, sequences: Sequence[Work], device: torch.device) -> torch.Tensor:
        return to_device(np.array([sequence.slot for sequence in sequences]), device)
