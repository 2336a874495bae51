"""The points of sequences that are being generated: which tokens may follow, and what the tokens of a point stand for.

A point is three tokens in a row. Each is fed back with what it stands for, chosen from the hidden state before it; the choices are those
of greatest logit, whatever the sampling of the text. Nothing here waits for the device, and all shapes stay the same from step to step, so
that the engine captures it in its graphs: rows choose among the image tokens of everybody, of which those of others are masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from molmo_core.nn.pointing import MASKED, NOT_SELECTABLE, PointEmbedding, PointPredictor, PointSources
from molmo_core.tokens import NO_MORE_POINTS, PointTokenIds

FORCED = 1e6
"""Logit of the token that has to follow; minus this: of one that must not."""
TEXT, TOKEN, PATCH, CELL = range(4)
"""Kinds of tokens."""


class PointStore(NamedTuple):
    """The image tokens of all rows, in any order in which those of one row rise; behind the last one, the end of a list."""

    owners: torch.Tensor
    """int64 [N + 1]: the `home` of the rows that may choose each; -1: nobody's."""
    orders: torch.Tensor
    """int64 [N + 1]: its number among those of its prompt; of the end `NO_MORE_POINTS`."""
    numbers: torch.Tensor
    """int64 [N + 1]: see `PointSources`."""
    selectable: torch.Tensor
    """bool [N + 1]: likewise."""
    keys: torch.Tensor
    """[N + 1, e]."""
    features: torch.Tensor
    """[N, d]."""
    patches: torch.Tensor
    """[N, k, P]."""
    present: torch.Tensor
    """bool [N, k]."""

    @classmethod
    def empty(cls, predictor: PointPredictor, tokens: int, patches: int) -> PointStore:
        """Of nobody: room for so many tokens with so many patches each."""
        end, key = tokens, predictor.patch_k.weight
        width, patch_width = predictor.width, predictor.subpatch_k.weight.shape[1]
        whole = torch.zeros(tokens + 1, dtype=torch.int64, device=key.device)
        store = cls(
            whole - 1, whole, whole.clone(), whole != 0, key.new_zeros(tokens + 1, len(key)), key.new_zeros(tokens, width),
            key.new_zeros(tokens, patches, patch_width), torch.zeros(tokens, patches, dtype=torch.bool, device=key.device),
        )  # fmt: skip
        store.orders[end], store.selectable[end] = NO_MORE_POINTS, True
        if predictor.config.no_more_points_class:
            store.keys[end] = predictor.add_no_point_class_embed.vector.detach()
        return store

    @classmethod
    def of(cls, predictor: PointPredictor, sources: PointSources, x: torch.Tensor) -> PointStore:
        """Of the rows of a batch, row i at home in i; x [B, M, d]: hidden states (normed) of the image tokens."""
        rows, tokens, patches = sources.present.shape
        store = cls.empty(predictor, 0, patches)
        order, home = (torch.arange(n, device=x.device) for n in (tokens, rows))
        keys = predictor.token_keys(x, sources.numbers)[:, :tokens]
        own = (home[:, None].expand(-1, tokens), order.expand(rows, -1), sources.numbers, sources.selectable, keys)
        joined = (torch.cat((t.flatten(0, 1), end.to(t.dtype))) for t, end in zip(own, store))
        return cls(*joined, *(t.flatten(0, 1) for t in (sources.features, sources.patches, sources.present)))


class PointRows(NamedTuple):
    """Where the rows of a batch are. All int64 [B], what is true or false as 1 or 0: the engine keeps them in one table."""

    home: torch.Tensor
    """Whose image tokens are its."""
    candidates: torch.Tensor
    """What there is to choose from: its image tokens, and the end of a list if the model has that."""
    width: torch.Tensor
    """Patches of its widest token, without what other rows pad them to."""
    can_point: torch.Tensor
    """Something is selectable."""
    started: torch.Tensor
    """It has a token."""
    kind: torch.Tensor
    """Of the newest token."""
    entry: torch.Tensor
    """Where the image token of the newest point is in the store."""
    token: torch.Tensor
    """Its number in the prompt; -1: there is none."""
    before: torch.Tensor
    """That of the point before."""
    slot: torch.Tensor
    """The newest patch; -1: there is none."""
    ended: torch.Tensor
    """The list ended by itself: no further points."""
    next_entry: torch.Tensor
    """What the next token would stand for: an image token (here where it is in the store, below its number or `NO_MORE_POINTS`), a
    patch, or a cell."""
    next_token: torch.Tensor
    next_slot: torch.Tensor
    next_cell: torch.Tensor

    @classmethod
    def begin(cls, home: torch.Tensor, candidates: int, sources: PointSources | None) -> PointRows:
        """Behind prompts; `sources`: of these rows, None: there is nothing to point at."""
        zero, none = torch.zeros_like(home), torch.full_like(home, -1)
        rows = cls(home, zero + candidates, zero, zero, zero, zero + TEXT, zero, none, none, none, zero, zero, none, zero, zero)
        if sources is None:
            return rows
        slots = torch.arange(1, sources.present.shape[-1] + 1, device=home.device)
        return rows._replace(width=(sources.present * slots).amax((1, 2)), can_point=sources.selectable.any(1).long())


class PointRules:
    """What points are chosen by: the same for rows of a batch and for the answers of the engine."""

    def __init__(self, predictor: PointPredictor, embedding: PointEmbedding, ids: PointTokenIds):
        """`predictor`, `embedding`: of the model; `ids`: of the tokens of points."""
        self.predictor, self.embedding, self.ids = predictor, embedding, ids

    def places(self, rows: PointRows, tokens: torch.Tensor) -> torch.Tensor:
        """What the next tokens int64 [B] stand for, int64 [B]: image token (or `NO_MORE_POINTS`), patch or cell; -1: they are text."""
        is_token, is_patch, is_cell = self._kinds(rows, tokens)
        place = torch.where(is_token, rows.next_token, -1)
        return torch.where(is_patch, rows.next_slot, torch.where(is_cell, rows.next_cell, place))

    def feed(self, store: PointStore, rows: PointRows, tokens: torch.Tensor) -> tuple[PointRows, torch.Tensor]:
        """The rows behind their next tokens int64 [B], and what is added to the embeddings of these, [B, d]."""
        is_token, is_patch, is_cell = self._kinds(rows, tokens)
        more = is_token & (rows.next_token != NO_MORE_POINTS)
        entry = torch.where(more, rows.next_entry, rows.entry)
        patches, slot = store.patches[entry], rows.next_slot
        added = torch.where(more[:, None], self.embedding.of_token(store.features[entry], patches), 0)
        of_patch = self.embedding.of_patch(patches[torch.arange(len(tokens), device=tokens.device), slot], slot)
        if of_patch is not None:
            added = torch.where(is_patch[:, None], of_patch, added)
        of_cell = self.embedding.of_cell(rows.next_cell)
        if of_cell is not None:
            added = torch.where(is_cell[:, None], of_cell, added)
        return rows._replace(
            started=torch.ones_like(tokens),
            kind=is_token * TOKEN + is_patch * PATCH + is_cell * CELL,
            entry=entry,
            token=torch.where(more, rows.next_token, rows.token),
            before=torch.where(more, rows.token, rows.before),
            slot=torch.where(is_patch, slot, rows.slot),
            ended=torch.where(is_token & ~more, 1, rows.ended),
        ), added

    def observe(self, store: PointStore, rows: PointRows, hidden: torch.Tensor, logits: torch.Tensor) -> PointRows:
        """The rows with what their next tokens would stand for. Of the tokens of points, those that must not follow are masked in place.

        Args:
            hidden: [B, d], output of the last block at the newest tokens.
            logits: [B, E'] there.
        """
        more = rows.ended == 0
        token_next = (rows.can_point != 0) & more & (rows.started != 0)
        patch_next = (rows.kind == TOKEN) & more
        cell_next = (rows.kind == PATCH) & bool(self.predictor.config.cells)
        force = min(FORCED, torch.finfo(logits.dtype).max / 2)
        logits[:, self.ids.token] = torch.where(token_next, logits[:, self.ids.token], -force)
        logits[:, self.ids.patch] = torch.where(patch_next, force, -force).to(logits.dtype)
        logits[:, self.ids.cell] = torch.where(cell_next, force, -force).to(logits.dtype)
        x = self.predictor.normed(hidden)
        entry, slot = self._choose_token(store, rows, x), self._choose_patch(store, rows, x)
        cell = self.predictor.subpatch_loc_k(hidden).argmax(-1) if self.predictor.config.cells else torch.zeros_like(slot)
        return rows._replace(next_entry=entry, next_token=store.orders[entry], next_slot=slot, next_cell=cell)

    def _kinds(self, rows: PointRows, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """bool [B] each: the tokens are of a point, of its patch, of its cell."""
        can_point = rows.can_point != 0
        return tuple((tokens == i) & can_point for i in (self.ids.token, self.ids.patch, self.ids.cell))

    def _choose_token(self, store: PointStore, rows: PointRows, x: torch.Tensor) -> torch.Tensor:
        """int64 [B]: where the chosen image tokens are in the store, the end of a list behind the last one."""
        config, last = self.predictor.config, rows.token[:, None]
        numbers = torch.where(rows.token < 0, 0, store.numbers[rows.entry])
        logits = self.predictor.token_logits(x[None], numbers[None], store.keys[None], rows.candidates[None, :, None])[0]
        is_end = store.orders == NO_MORE_POINTS
        masked = is_end & (last < 0)
        before = store.orders < last
        if config.mask_repeats != "never":  # the last patch of a token was chosen: nothing of it is left
            used = (rows.slot == rows.width - 1) & (rows.token >= 0)
            masked = masked | ((before | (store.orders == last)) & used[:, None])
        if config.mask_patches != "never":
            masked = masked | before
        mine = (store.owners == rows.home[:, None]) | (is_end & config.no_more_points_class)
        logits = torch.where(store.selectable, logits, NOT_SELECTABLE).masked_fill(masked, MASKED)
        return logits.masked_fill(~mine, -torch.inf).argmax(-1)

    def _choose_patch(self, store: PointStore, rows: PointRows, x: torch.Tensor) -> torch.Tensor:
        """int64 [B]: a patch of the image token of each row's newest point."""
        config = self.predictor.config
        logits = self.predictor.patch_logits(x, self.predictor.subpatch_k(store.patches[rows.entry]))
        if config.mask_subpatches != "never":
            logits = logits.masked_fill(~store.present[rows.entry], MASKED)
        slots = torch.arange(logits.shape[1], device=x.device)
        again = (rows.token == rows.before)[:, None]
        if config.mask_repeats != "never":
            logits = logits.masked_fill(again & (slots <= rows.slot[:, None]), MASKED)
        elif config.mask_patches != "never":
            logits = logits.masked_fill(again & (slots < rows.slot[:, None]), MASKED)
        return logits.masked_fill(slots >= rows.width.clamp(min=1)[:, None], -torch.inf).argmax(-1)


class PointState:
    """The rows of a batch behind their prompts.

    `feed` is given each new token and says what is added to its embedding; `observe` is given the hidden state behind it and says what
    may follow.
    """

    def __init__(
        self, predictor: PointPredictor, embedding: PointEmbedding, ids: PointTokenIds, sources: PointSources, x: torch.Tensor
    ) -> None:
        """
        Args:
            predictor, embedding, ids: see `PointRules`.
            sources: what points of the prompts can be chosen from.
            x: [B, M, d], hidden states (normed) of the image tokens.
        """
        self.rules, self.store = PointRules(predictor, embedding, ids), PointStore.of(predictor, sources, x)
        home, ends = torch.arange(len(x), device=x.device), predictor.config.no_more_points_class
        self.rows = PointRows.begin(home, x.shape[1] + ends, sources)
        self.places: list[torch.Tensor] = []
        """What each fed token stands for, see `PointRules.places`."""

    def begin(self) -> None:
        self.rows, self.places = self.rows._replace(started=torch.zeros_like(self.rows.started)), []

    def observe(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens that follow, see `PointRules.observe`; those that are given are changed."""
        self.rows = self.rules.observe(self.store, self.rows, hidden, logits)
        return logits

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What is added to the embeddings of the next tokens int64 [B]: [B, d]."""
        self.places.append(self.rules.places(self.rows, tokens))
        self.rows, added = self.rules.feed(self.store, self.rows, tokens)
        return added

    def reorder(self, rows: torch.Tensor) -> None:
        self.rows = PointRows(*(t.index_select(0, rows) for t in self.rows))
        self.places = [places.index_select(0, rows) for places in self.places]

    def internal(self) -> dict[str, torch.Tensor]:
        home = self.rows.home
        places = torch.stack(self.places, 1) if self.places else torch.empty(len(home), 0, dtype=torch.int64, device=home.device)
        return {"point_places": places}
