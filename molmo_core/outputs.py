"""What `forward` and `generate` return (seed: Output Classes)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class OLMoOutput(NamedTuple):
    """Output of a forward pass."""

    logits: torch.Tensor
    """[B, S, E] (or [B, 1, E] when only the last valid position was asked for)."""
    loss: torch.Tensor | None = None
    """Scalar, when labels were given."""
    past_key_values: Any | None = None
    """The key/value cache, when `use_cache`."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """[B, S, d] of every block, when asked for."""
    attentions: tuple[torch.Tensor, ...] | None = None
    metrics: dict[str, torch.Tensor] | None = None
    """Auxiliary losses and statistics (router losses, token selection), by name."""
    internal: dict[str, torch.Tensor] | None = None
    """What visualisations need, by name (for example HeMolmo's selected tokens)."""


class OLMoGenerateOutput(NamedTuple):
    """Output of `generate`."""

    token_ids: torch.Tensor
    """[B, L] new tokens of the best sequence, without the prompt, padded with pad_token_id after the end."""
    text: list[str]
    """The decoded text of each row."""
    scores: torch.Tensor | None = None
    """[B] sum of the log-probabilities of the new tokens (beam search: of the best beam)."""
    beams: torch.Tensor | None = None
    """[B, num_beams, L], best first (beam search only)."""
    beam_scores: torch.Tensor | None = None
    """[B, num_beams]."""
    internal: dict[str, torch.Tensor] | None = None
