"""The points of the answers in work, on the device (MolmoPoint): what each slot can choose from, and where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from molmo_core.generation.point_state import PointRows, PointRules, PointStore
from molmo_core.nn.pointing import PointSources

TOKENS = 4095
"""Image tokens that there is room for at first (0.1 GB for the released 8B model). With the end of a list they are a multiple of 8, which
matrix products like."""


class PointSlots:
    """All that a step reads and writes; graphs are captured with its tensors.

    Answers take entries of one store, so that memory is what their own pictures need. Who needs more than there is makes it grow: then
    `version` is another one, and graphs have to be captured anew.
    """

    def __init__(self, model: Any, slots: int):
        """`slots`: answers in work at most."""
        self.rules = PointRules(model.point_predictor, model.point_embedding, model.config.point_tokens)
        images = model.config.mm_preprocessor  # windows of videos are wider: the first one makes room
        self.store = PointStore.empty(model.point_predictor, TOKENS, images.pooling_h * images.pooling_w)
        self.version = 0
        self._free = np.ones(TOKENS, bool)
        self._rows = torch.zeros(slots + 1, len(PointRows._fields), dtype=torch.int64, device=self.store.owners.device)
        """Those of each slot; the last one is nobody's."""

    # -- who has what, between the steps --------------------------------------------------------------------------------

    def take(self, tokens: int, patches: int) -> np.ndarray:
        """int64 [tokens], rising: room for so many image tokens with so many patches each."""
        missing, most = tokens - int(self._free.sum()), self.store.present.shape[1]
        if missing > 0 or patches > most:
            self._grow(max(missing, 0), max(patches, most))
        entries = np.flatnonzero(self._free)[:tokens]
        self._free[entries] = False
        return entries

    def release(self, entries: np.ndarray) -> None:
        """They can be taken again. The steps that were launched with them come before those that write to them."""
        self._free[entries] = True

    def fill(self, entries: torch.Tensor, sources: PointSources, x: torch.Tensor) -> None:
        """The image tokens [1, M] of a prompt go to their entries int64 [M]; x [1, M, d]: their hidden states (normed)."""
        store, tokens = self.store, len(entries)
        more = store.present.shape[1] - sources.present.shape[2]
        store.orders[entries] = torch.arange(tokens, device=entries.device)
        store.numbers[entries], store.selectable[entries] = sources.numbers[0], sources.selectable[0]
        store.keys[entries] = self.rules.predictor.token_keys(x, sources.numbers)[0, :tokens].to(store.keys.dtype)
        store.features[entries] = sources.features[0].to(store.features.dtype)
        store.patches[entries] = F.pad(sources.patches[0], (0, 0, 0, more)).to(store.patches.dtype)
        store.present[entries] = F.pad(sources.present[0], (0, more))

    def begin(self, slot: int, rows: PointRows, entries: torch.Tensor | None) -> None:
        """An answer is in this slot from now on; `rows`: where it is, int64 [1] each."""
        # Who had the slot before may wait for another one.
        self.store.owners.masked_fill_(self.store.owners == slot, -1)
        if entries is not None:
            self.store.owners[entries] = slot
        self._rows[slot] = torch.cat(rows)

    def _grow(self, missing: int, patches: int) -> None:
        """Room for so many image tokens more, or half as many as there is; 0: for wider ones."""
        count, unit = len(self._free), TOKENS + 1
        tokens = -(-(count + max(missing, count // 2) + 1) // unit) * unit - 1 if missing else count
        store = PointStore.empty(self.rules.predictor, tokens, patches)
        for new, old in zip(store, self.store):  # the end of a list, behind them, is there already
            new[tuple(slice(size) for size in (count, *old.shape[1:]))] = old[:count]
        self.store, self.version = store, self.version + 1
        self._free = np.append(self._free, np.ones(tokens - count, bool))

    # -- in a step: nothing waits, and shapes depend on the size of the batch only ----------------------------------------

    def feed(self, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What is added to the embeddings of the newest tokens int64 [B] of the slots int64 [B]: [B, d]. Once for each token."""
        rows, added = self.rules.feed(self.store, self._of(slots), tokens)
        self._rows.index_copy_(0, slots, torch.stack(rows, 1))
        return added

    def observe(self, slots: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Masks logits [B, E] of the tokens that must not follow in place, given the hidden states [B, d], and chooses what those that
        may would stand for."""
        rows = self.rules.observe(self.store, self._of(slots), hidden, logits)
        self._rows.index_copy_(0, slots, torch.stack(rows, 1))

    def places(self, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What the next tokens int64 [B] stand for, int64 [B], -1: they are text."""
        return self.rules.places(self._of(slots), tokens)

    def _of(self, slots: torch.Tensor) -> PointRows:
        return PointRows(*self._rows[slots].unbind(1))
