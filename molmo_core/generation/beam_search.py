"""Beam search by cumulative log-probability, as the published code does it (no length normalisation)."""

from __future__ import annotations

import torch


class BeamSearch:
    """The beams of a batch. Fed log-probabilities step by step, it says which beams continue and with which tokens.

    A beam that produced an end token stays in the race with its score and is padded from then on.
    """

    def __init__(self, num_beams: int, eos_token_ids: torch.Tensor, pad_token_id: int) -> None:
        """`eos_token_ids`: [n] int64, may be empty."""
        self.num_beams = num_beams
        self._eos = eos_token_ids
        self._pad = pad_token_id
        self.tokens: torch.Tensor
        """[B, num_beams, steps], best first."""
        self.scores: torch.Tensor
        """[B, num_beams] cumulative log-probabilities, descending."""
        self.finished: torch.Tensor
        """[B, num_beams] bool."""

    def start(self, log_probs: torch.Tensor) -> None:
        """First step. `log_probs`: [B, E] after the prompt."""
        if log_probs.shape[-1] < self.num_beams:
            raise ValueError(f"num_beams={self.num_beams} is more than the vocabulary of {log_probs.shape[-1]} tokens")
        self.scores, tokens = log_probs.topk(self.num_beams, dim=-1)
        self.tokens = tokens.unsqueeze(-1)
        self.finished = torch.isin(tokens, self._eos)

    def step(self, log_probs: torch.Tensor) -> torch.Tensor:
        """One step of every beam.

        Args:
            log_probs: [B, num_beams, E] of the next token of every beam, in the order of `tokens`.

        Returns:
            [B, num_beams] the beam that each new beam continues.
        """
        batch, beams, vocabulary = log_probs.shape
        # A finished beam has one continuation, at no cost: it stays in column 0 until it is written as padding.
        log_probs = log_probs.masked_fill(self.finished.unsqueeze(-1), -torch.inf)
        log_probs[..., 0] = log_probs[..., 0].masked_fill(self.finished, 0.0)
        total = self.scores.unsqueeze(-1) + log_probs
        self.scores, flat = total.view(batch, beams * vocabulary).topk(beams, dim=-1)
        parents, tokens = flat // vocabulary, flat % vocabulary
        finished = self.finished.gather(1, parents)
        tokens = tokens.masked_fill(finished, self._pad)
        history = self.tokens.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1]))
        self.tokens = torch.cat([history, tokens.unsqueeze(-1)], dim=-1)
        self.finished = finished | torch.isin(tokens, self._eos)
        return parents
