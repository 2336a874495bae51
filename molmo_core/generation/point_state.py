"""The points of sequences that are being generated: which tokens may follow, and what the tokens of a point stand for.

A point is three tokens in a row. Each is fed back with what it stands for, chosen from the hidden state before it; the choices are those
of greatest logit, whatever the sampling of the text. Nothing here waits for the device, and all shapes stay the same from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from molmo_core.nn.pointing import MASKED, NOT_SELECTABLE, PointEmbedding, PointPredictor, PointSources
from molmo_core.tokens import NO_MORE_POINTS, PointTokenIds

FORCED = 1e6
"""Logit of the token that has to follow; minus this: of one that must not."""
_TEXT, _TOKEN, _PATCH, _CELL = range(4)


class PointState:
    """The rows of a batch behind their prompts (or one row of the engine).

    `feed` is given each new token and says what is added to its embedding; `observe` is given the hidden state behind it and says what
    may follow.
    """

    def __init__(
        self, predictor: PointPredictor, embedding: PointEmbedding, ids: PointTokenIds, sources: PointSources, x: torch.Tensor
    ) -> None:
        """
        Args:
            predictor, embedding: of the model.
            ids: of the tokens of points.
            sources: what points of the prompts can be chosen from.
            x: [B, M, d], hidden states (normed) of the image tokens.
        """
        self.predictor, self.embedding, self.ids, config = predictor, embedding, ids, predictor.config
        rows, device = len(x), x.device
        self._keys = predictor.token_keys(x, sources.numbers)
        self._patch_keys = predictor.subpatch_k(sources.patches)
        self._features, self._patches, self._present = sources.features, sources.patches, sources.present
        self._numbers, self._selectable = sources.numbers, sources.selectable
        slots = torch.arange(1, sources.present.shape[-1] + 1, device=device)
        self._widths = (sources.present * slots).amax((1, 2))  # of the row's own tokens, without what other rows pad them to
        self._can_point = sources.selectable.any(1)
        self._ends = config.no_more_points_class
        self._hidden = x.new_zeros(rows, x.shape[-1])
        self._kind = torch.full((rows,), _TEXT, device=device)
        self._started = False
        none = torch.full((rows,), -1, device=device)
        self.token, self.before, self.slot = none, none, none
        """Image token of the newest point, of the one before it, and the patch of the newest that has one; -1: there is none."""
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        """The list ended by itself: no further points."""
        self.places: list[torch.Tensor] = []
        """What each fed token stands for, int64 [B]: image token (or `NO_MORE_POINTS`), patch or cell; -1: it is text."""

    def begin(self) -> None:
        self._started, self.places = False, []

    def observe(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens that follow.

        Args:
            hidden: [B, d], output of the last block at the newest tokens.
            logits: [B, E'] there.
        """
        self._hidden = hidden
        started, self._started = self._started, True
        logits = logits.clone()
        open_ = self._can_point & ~self.ended if started else torch.zeros_like(self.ended)
        patch_next = (self._kind == _TOKEN) & ~self.ended
        cell_next = (self._kind == _PATCH) & bool(self.predictor.config.cells)
        force = min(FORCED, torch.finfo(logits.dtype).max / 2)
        logits[:, self.ids.token] = torch.where(open_, logits[:, self.ids.token], -force)
        logits[:, self.ids.patch] = torch.where(patch_next, force, -force).to(logits.dtype)
        logits[:, self.ids.cell] = torch.where(cell_next, force, -force).to(logits.dtype)
        return logits

    def text(self) -> None:
        """The next tokens are text; `feed` would do, too."""
        self._kind = torch.full_like(self._kind, _TEXT)
        self.places.append(torch.full_like(self.token, -1))

    def resume(self, tokens: Sequence[int], places: Sequence[int]) -> None:
        """Of one row: goes on behind tokens of an answer that were generated before, and what each stands for."""
        kinds = {self.ids.token: _TOKEN, self.ids.patch: _PATCH, self.ids.cell: _CELL}
        for token, place in zip(tokens, places):
            kind = kinds[token] if place >= 0 else _TEXT
            if kind == _TOKEN and place == NO_MORE_POINTS:
                self.ended = torch.ones_like(self.ended)
            elif kind == _TOKEN:
                self.before, self.token = self.token, torch.full_like(self.token, place)
            elif kind == _PATCH:
                self.slot = torch.full_like(self.slot, place)
            self._kind, self._started = torch.full_like(self._kind, kind), True
            self.places.append(torch.full_like(self.token, place))

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What is added to the embeddings of the next tokens int64 [B]: [B, d]. Chooses what they stand for."""
        batch = torch.arange(len(tokens), device=tokens.device)
        is_token, is_patch, is_cell = (tokens == i for i in (self.ids.token, self.ids.patch, self.ids.cell))
        x = self.predictor.normed(self._hidden)

        chosen = self._choose_token(x)
        more = chosen < self._patches.shape[1]
        self.ended = self.ended | (is_token & ~more)
        self.before = torch.where(is_token & more, self.token, self.before)
        self.token = torch.where(is_token & more, chosen, self.token)
        now = self.token.clamp(min=0)
        patches = self._patches[batch, now]
        slot = self._choose_patch(x, now)
        self.slot = torch.where(is_patch, slot, self.slot)
        cell = self.predictor.subpatch_loc_k(self._hidden).argmax(-1) if self.predictor.config.cells else torch.zeros_like(slot)

        added = torch.where((is_token & more)[:, None], self.embedding.of_token(self._features[batch, now], patches), 0)
        of_patch = self.embedding.of_patch(patches[batch, slot], slot)
        if of_patch is not None:
            added = torch.where(is_patch[:, None], of_patch, added)
        of_cell = self.embedding.of_cell(cell)
        if of_cell is not None:
            added = torch.where(is_cell[:, None], of_cell, added)
        place = torch.where(is_token, torch.where(more, chosen, NO_MORE_POINTS), -1)
        self.places.append(torch.where(is_patch, slot, torch.where(is_cell, cell, place)))
        self._kind = is_token * _TOKEN + is_patch * _PATCH + is_cell * _CELL
        return added

    def reorder(self, rows: torch.Tensor) -> None:
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.index_select(0, rows))
        self.places = [places.index_select(0, rows) for places in self.places]

    def internal(self) -> dict[str, torch.Tensor]:
        if not self.places:
            return {"point_places": torch.empty(len(self.ended), 0, dtype=torch.int64, device=self.ended.device)}
        return {"point_places": torch.stack(self.places, 1)}

    def _choose_token(self, x: torch.Tensor) -> torch.Tensor:
        """int64 [B]: an image token, or as many as there are of them: no more points."""
        config, last, batch = self.predictor.config, self.token, torch.arange(len(x), device=x.device)
        logits = self.predictor.token_logits(x[:, None], self._numbers[batch, last.clamp(min=0)][:, None], self._keys)[:, 0]
        count = self._selectable.shape[1]
        candidates = torch.arange(logits.shape[1], device=x.device)
        is_end = candidates == count
        logits = torch.where(torch.nn.functional.pad(self._selectable, (0, logits.shape[1] - count), value=True), logits, NOT_SELECTABLE)
        before = candidates < last[:, None]
        if config.mask_repeats != "never":  # the last patch of a token was chosen: nothing of it is left
            used = (self.slot == self._widths - 1) & (last >= 0)
            logits = logits.masked_fill((before | (candidates == last[:, None])) & used[:, None], MASKED)
        if config.mask_patches != "never":
            logits = logits.masked_fill(before, MASKED)
        return logits.masked_fill(is_end & (last < 0)[:, None], MASKED).argmax(-1)

    def _choose_patch(self, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """int64 [B]: a patch of each token int64 [B]."""
        config, batch = self.predictor.config, torch.arange(len(x), device=x.device)
        logits = self.predictor.patch_logits(x, self._patch_keys[batch, token])
        if config.mask_subpatches != "never":
            logits = logits.masked_fill(~self._present[batch, token], MASKED)
        slots = torch.arange(logits.shape[1], device=x.device)
        again = (self.token == self.before)[:, None]
        if config.mask_repeats != "never":
            logits = logits.masked_fill(again & (slots <= self.slot[:, None]), MASKED)
        elif config.mask_patches != "never":
            logits = logits.masked_fill(again & (slots < self.slot[:, None]), MASKED)
        return logits.masked_fill(slots >= self._widths.clamp(min=1)[:, None], -torch.inf).argmax(-1)
