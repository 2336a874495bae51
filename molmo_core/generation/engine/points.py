"""The points of the answers in work (MolmoPoint): which tokens may follow, what those of a point stand for, and what is fed back.

What is chosen stays on the device until a token of a point needs it; only the numbers go to the host, with the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from molmo_core.generation.engine.scheduler import Sequence as Work
from molmo_core.generation.point_state import FORCED, PointState
from molmo_core.nn.pointing import PointSources


@dataclasses.dataclass
class _Answer:
    """What is known of the points of one answer."""

    places: list[int]
    """Of each of its tokens: what it stands for, -1: it is text."""
    image_tokens: np.ndarray
    """int64 [M], their positions in the prompt."""
    sources: PointSources | None = None
    states: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """Hidden states (normed) of the image tokens that were read so far, each [n, d]."""
    state: PointState | None = None
    added: torch.Tensor | None = None
    """[d]: belongs to the embedding of the newest token, beside the token's own."""


class Points:
    """The points of all answers of an engine."""

    def __init__(self, model: Any):
        self._model, self._ids = model, model.config.point_tokens
        self._columns = [self._ids.token, self._ids.patch, self._ids.cell]
        self._answers: dict[Work, _Answer] = {}

    def begin(self, sequence: Work, ids: np.ndarray, places: Iterable[int]) -> None:
        """A sequence whose prompt has these ids; `places`: of tokens of its answer that were generated elsewhere."""
        tokens = self._model.config.image_tokens
        self._answers[sequence] = _Answer(list(places), np.flatnonzero(np.isin(ids, (tokens.patch, tokens.low))))

    def end(self, sequence: Work) -> None:
        """Forgets it."""
        self._answers.pop(sequence, None)

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
        if answer.state is None and len(answer.image_tokens):
            answer.sources = sources

    def read(self, sequence: Work, start: int, hidden: torch.Tensor) -> None:
        """Tokens of a prompt from `start` on were computed: hidden [n, d] behind the last block."""
        answer = self._answers[sequence]
        if answer.sources is None:
            return
        if start == 0:
            answer.states = []  # it had been preempted
        places = answer.image_tokens
        here = places[(places >= start) & (places < start + len(hidden))] - start
        answer.states.append(self._model.point_predictor.normed(hidden[torch.from_numpy(here).to(hidden.device)]))
        if start + len(hidden) == len(sequence.tokens):
            model, x = self._model, torch.cat(answer.states)[None]
            answer.state = PointState(model.point_predictor, model.point_embedding, self._ids, answer.sources, x)
            answer.state.resume(sequence.tokens[sequence.prompt_length :], answer.places)
            answer.sources, answer.states = None, []

    def allowed(self, sequences: Sequence[Work], hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, E] of what may follow the newest tokens, whose hidden states are [B, d]."""
        rows = []
        for i, sequence in enumerate(sequences):
            state = self._answers[sequence].state
            rows.append(logits[i : i + 1] if state is None else state.observe(hidden[i : i + 1], logits[i : i + 1]))
        silent = [i for i, sequence in enumerate(sequences) if self._answers[sequence].state is None]
        result = torch.cat(rows)
        if silent:  # nothing to point at
            result[torch.tensor(silent)[:, None], torch.tensor(self._columns)] = -FORCED
        return result

    def chosen(self, sequences: Sequence[Work], tokens: Sequence[int]) -> list[int]:
        """What the next tokens stand for, -1: they are text."""
        places, pending = [-1] * len(tokens), []
        for i, (sequence, token) in enumerate(zip(sequences, tokens)):
            answer = self._answers[sequence]
            answer.added = None
            if answer.state is None:
                continue
            if token not in self._columns:
                answer.state.text()
                continue
            answer.added = answer.state.feed(torch.tensor([token], device=answer.state.ended.device))[0]
            pending.append((i, answer.state.places[-1]))
        if pending:
            for (i, _), place in zip(pending, torch.cat([place for _, place in pending]).tolist()):
                places[i] = place
        for sequence, place in zip(sequences, places):
            self._answers[sequence].places.append(place)
        return places

    def fed(self, sequences: Sequence[Work], x: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, 1, d] of the newest tokens, with what they stand for."""
        rows = [i for i, sequence in enumerate(sequences) if self._answers[sequence].added is not None]
        if not rows:
            return x
        added = torch.stack([self._answers[sequences[i]].added for i in rows])  # type: ignore[misc]
        return x.index_add(0, torch.tensor(rows, device=x.device), added[:, None].to(x.dtype))
