"""What the engine knows of a prompt: who sees whom, where it may be cut, what its pages are called. On the CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from molmo_core.generation.engine.features import media_digest
from molmo_core.generation.engine.pages import page_keys
from molmo_core.generation.engine.stopwatch import Stopwatch
from molmo_core.nn.attention import SequenceLayout
from molmo_core.nn.llm import Pass
from molmo_core.nn.sequence_layout import sequence_layout


class Prompt:
    """The inputs of one prompt, and what follows from them (when it is first asked for: hashing a picture takes milliseconds)."""

    def __init__(self, example: Mapping[str, Any], model: Any, page_size: int):
        """
        Args:
            example: inputs of the model, as a preprocessor gives them.
            model: whose configuration says how tokens see each other.
            page_size: tokens of a page.

        Raises:
            ValueError: no token, or inputs of training.
        """
        given = {k: np.asarray(v) for k, v in example.items() if v is not None and k not in ("metadata", "labels", "loss_masks")}
        if "input_ids" not in given:
            raise ValueError("a prompt needs input_ids")
        ids = given["input_ids"] = given["input_ids"].astype(np.int64)
        if ids.ndim != 1 or not len(ids) or (ids < 0).any():
            raise ValueError(f"input_ids must be the tokens of one prompt without padding, got shape {ids.shape}")
        if "subsegment_ids" in given:
            raise ValueError("subsegment_ids mark message trees and packed examples; a prompt is one conversation")
        self.example: dict[str, np.ndarray] = given
        self.positions: np.ndarray = given.setdefault("position_ids", np.arange(len(ids))).astype(np.int64)
        """int64 [prompt], rotary."""
        if self.positions.shape != ids.shape or (self.positions < 0).any():
            raise ValueError(f"position_ids must be {len(ids)} positions, one a token, none negative")
        self.whole: bool = model.FILLS_CACHE
        """It has to be computed in one piece, and shares no pages."""
        self._config, self._page_size = model.config, page_size
        self.embedded: Pass | None = None
        """Of all tokens but the first `done`, one row, while the prompt is being computed."""
        self.done = 0
        """Tokens that embedding has computed into the pages already."""
        self.pages: list[int] | None = None
        """Those that its sequence had when it was embedded: a preempted one gets others, and is embedded anew."""
        self.looked: Stopwatch | None = None
        """How long its media were looked at, if they were."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def next_position(self) -> int:
        """Rotary position of the first token of the answer."""
        return int(self.positions[-1]) + 1

    @functools.cached_property
    def digest(self) -> bytes:
        """Of the media; empty: there are none."""
        return media_digest(self.example) if self.example.get("images") is not None else b""

    @functools.cached_property
    def layout(self) -> SequenceLayout:
        """[1, prompt], on the CPU."""
        ids = torch.from_numpy(self.example["input_ids"])[None]
        return sequence_layout(ids, self._config.image_tokens, self._config.bi_directional_attn)

    @functools.cached_property
    def horizon(self) -> np.ndarray | None:
        """int64 [prompt]: the last token that each one or an earlier one sees; None: itself."""
        groups = self.layout.groups
        if groups is None:
            return None
        group = groups[0].numpy()
        last = np.arange(len(group))
        if self.layout.questions is not None:
            last[group >= 0] = len(group) - 1
        for number in np.unique(group[group >= 0]).tolist():
            members = np.flatnonzero(group == number)
            last[members] = np.maximum(last[members], members[-1])
        return np.maximum.accumulate(last)

    @functools.cached_property
    def keys(self) -> list[bytes]:
        """Of its full pages; empty: they are not shared."""
        if self.whole or (hasattr(self._config, "point_tokens") and self.digest):  # points need the states of all image tokens
            return []
        ids = self.example["input_ids"]
        media = np.isin(ids, self._config.image_tokens.all)
        first = int(media.argmax()) if self.digest and media.any() else len(ids)
        return page_keys(ids, self.positions, self.horizon, self.digest, first, self._page_size)

    def until(self, end: int) -> SequenceLayout:
        """The layout of the first `end` tokens, answer included: what is answered already is text, and no question that media look
        ahead to."""
        layout, missing = self.layout, max(0, end - len(self))

        def cut(values: torch.Tensor | None, fill: int) -> torch.Tensor | None:
            return None if values is None else torch.nn.functional.pad(values, (0, missing), value=fill)[:, :end]

        return SequenceLayout(groups=cut(layout.groups, -1), questions=cut(layout.questions, False))

    def flags(self, start: int, end: int) -> np.ndarray:
        """int32 [end - start]: twice the group of each token (-1: none), plus 1 if media look ahead to it."""
        layout = self.until(end)
        if layout.groups is None:
            return np.full(end - start, -2, np.int32)
        flags = 2 * layout.groups[0, start:]
        return (flags if layout.questions is None else flags + layout.questions[0, start:]).numpy().astype(np.int32)

    def seen_until(self, place: int) -> int:
        """One behind the last token that the one at `place`, or one before it, sees."""
        horizon = self.horizon
        return place + 1 if horizon is None or place >= len(horizon) else int(horizon[place]) + 1
