"""What requests change in their logits: penalties, biases, a least length. For all rows of a batch at once, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from molmo_core.generation.engine.rows import Row
from molmo_core.generation.engine.staging import to_device


class Histories:
    """Which tokens were in the prompts of answers, and how often they are in the answers; for those that ask for penalties, by slot."""

    def __init__(self, slots: int, device: torch.device):
        self._slots, self._device = slots, device
        self._pages: list[object] = [None] * slots
        self.prompts = self.answers = torch.empty(0)
        """bool and int32 [slots, E], once they are asked for."""

    def begin(self, rows: Sequence[Row], size: int) -> None:
        """Rows whose tokens so far are to be counted, unless they are already; E is `size`."""
        if not self.answers.numel():
            self.prompts = torch.zeros(self._slots, size, dtype=torch.bool, device=self._device)
            self.answers = torch.zeros(self._slots, size, dtype=torch.int32, device=self._device)
        for row in rows:
            if self._pages[row.slot] is row.pages and row.pages is not None:
                continue
            self._pages[row.slot] = row.pages
            tokens = np.asarray(row.tokens)
            counts = [np.bincount(part[(part >= 0) & (part < size)], minlength=size) for part in np.split(tokens, [row.prompt_length])]
            self.prompts[row.slot] = to_device(counts[0] > 0, self._device)
            self.answers[row.slot] = to_device(counts[1].astype(np.int32), self._device)


class Edits:
    """What the rows of one batch change."""

    def __init__(self, rows: Sequence[Row], device: torch.device):
        self._rows, self._device = rows, device
        self._penalised = [i for i, row in enumerate(rows) if row.params.penalises]
        self._biases = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.params.logit_bias.items()]
        self._least = [(i, row) for i, row in enumerate(rows) if row.params.min_tokens]
        self._ready = False
        self._short: list[int] = []
        """Rows whose answers may not end yet, and on the device their index and that of their end tokens."""
        self._short_index: tuple[torch.Tensor, ...] = ()

    def apply(self, logits: torch.Tensor, histories: Histories) -> None:
        """In place, on float32 [B, E]."""
        if not self._ready:
            self._prepare(logits.shape[-1], histories)
        if self._penalised:
            values, used = logits[self._index], histories.answers[self._slots]
            seen = histories.prompts[self._slots] | (used > 0)
            values = torch.where(seen, torch.where(values > 0, values / self._repetition, values * self._repetition), values)
            logits[self._index] = values - self._presence * (used > 0) - self._frequency * used
        if self._biases:
            logits[self._bias_rows, self._bias_tokens] += self._bias
        short = [i for i, row in self._least if row.answered < row.params.min_tokens]
        if short:
            self._lengthen(logits, short)

    def count(self, tokens: torch.Tensor, histories: Histories) -> None:
        """These tokens int64 [B] were chosen."""
        if self._penalised:
            histories.answers[self._slots, tokens[self._index]] += 1

    def _prepare(self, size: int, histories: Histories) -> None:
        rows = [self._rows[i] for i in self._penalised]
        if rows:
            histories.begin(rows, size)
            self._index, self._slots = self._sent([self._penalised, [row.slot for row in rows]], np.int64)
            settings = [(max(p.repetition_penalty, 1e-30), p.presence_penalty, p.frequency_penalty) for p in (row.params for row in rows)]
            self._repetition, self._presence, self._frequency = self._sent(np.array(settings).clip(-1e30, 1e30).T, np.float32)[:, :, None]
        self._biases = [(i, token, bias) for i, token, bias in self._biases if 0 <= token < size]
        if self._biases:
            self._bias_rows, self._bias_tokens = self._sent(np.array([(i, token) for i, token, _ in self._biases]).T, np.int64)
            self._bias = self._sent([bias for *_, bias in self._biases], np.float32)
        self._ready = True

    def _lengthen(self, logits: torch.Tensor, short: list[int]) -> None:
        """No end for these rows."""
        if short != self._short:
            size = logits.shape[-1]
            ends = [(n, token) for n, i in enumerate(short) for token in self._rows[i].ends if 0 <= token < size]
            self._short = short
            self._short_index = (self._sent(short, np.int64), *self._sent(np.array(ends, np.int64).reshape(-1, 2).T, np.int64))
        index, *ends_index = self._short_index
        values = logits[index]
        longer = values.index_put(tuple(ends_index), values.new_full((), -torch.inf))
        # A grammar may leave nothing but the end.
        logits[index] = torch.where(longer.amax(-1, keepdim=True) > -torch.inf, longer, values)

    def _sent(self, values: Any, dtype: Any) -> torch.Tensor:
        return to_device(np.array(values, dtype), self._device)
