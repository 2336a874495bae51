"""Rotary position embedding: half-split rotation, with the default, llama3 and YaRN frequencies.

Nothing is stored in the module: frequencies come from the configuration and tables from the positions of the batch, in float32. So
casting a model to bfloat16 or building it on the meta device cannot spoil them.
"""

from __future__ import annotations

import math

import torch

from molmo_core.config import ConfigError
from molmo_core.nn.configs import LlmConfig

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each float32 [B, 1, S, head_dim]."""


def rotary_tables(config: LlmConfig, position_ids: torch.Tensor) -> list[Rotary]:
    """The tables of every layer (layers that share their frequencies share the tensors).

    Args:
        config: the language model's configuration.
        position_ids: int64 [B, S].
    """
    device = position_ids.device
    scaled = _table(*scaled_frequencies(config, device), position_ids)
    layers = range(config.n_layers)
    if config.rope_type == "default" or config.rope_scaling_layers is None:
        return [scaled for _ in layers]
    plain = _table(frequencies(config, device), 1.0, position_ids)
    return [scaled if layer in config.rope_scaling_layers else plain for layer in layers]


def apply_rotary(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotates x [B, H, S, head_dim] in float32 and casts back."""
    cos, sin = rotary
    t = x.float()
    first, second = t.chunk(2, dim=-1)
    return (t * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def frequencies(config: LlmConfig, device: torch.device) -> torch.Tensor:
    """Unscaled inverse frequencies, float32 [head_dim / 2]."""
    width = config.head_width
    return 1.0 / (config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width))


def scaled_frequencies(config: LlmConfig, device: torch.device) -> tuple[torch.Tensor, float]:
    """Inverse frequencies float32 [head_dim / 2] after scaling, and the factor of cos and sin."""
    inverse = frequencies(config, device)
    if config.rope_type == "llama3":
        return _llama3(config, inverse), 1.0
    if config.rope_type == "yarn":
        factor = _need(config, "rope_factor")
        attention = config.rope_attention_factor
        return _yarn(config, inverse), 0.1 * math.log(factor) + 1.0 if attention is None else attention
    return inverse, 1.0


def _table(inverse: torch.Tensor, factor: float, position_ids: torch.Tensor) -> Rotary:
    with torch.autocast(inverse.device.type, enabled=False):
        angles = position_ids[:, None, :, None].float() * inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * factor, angles.sin() * factor


def _llama3(config: LlmConfig, inverse: torch.Tensor) -> torch.Tensor:
    factor, original = _need(config, "rope_factor"), _need(config, "rope_original_max_position_embeddings")
    low, high = _need(config, "rope_low_freq_factor"), _need(config, "rope_high_freq_factor")
    wavelength = 2 * math.pi / inverse
    blend = (original / wavelength - low) / (high - low)
    between = (1 - blend) * inverse / factor + blend * inverse
    return torch.where(wavelength > original / low, inverse / factor, torch.where(wavelength < original / high, inverse, between))


def _yarn(config: LlmConfig, inverse: torch.Tensor) -> torch.Tensor:
    factor, original = _need(config, "rope_factor"), _need(config, "rope_original_max_position_embeddings")
    fast = 32.0 if config.rope_beta_fast is None else config.rope_beta_fast
    slow = 1.0 if config.rope_beta_slow is None else config.rope_beta_slow
    width = config.head_width

    def dimension(rotations: float) -> float:
        """Index of the frequency that turns `rotations` times within the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), width - 1)
    steps = torch.arange(width // 2, dtype=torch.float32, device=inverse.device)
    ramp = ((steps - low) / (max(high - low, 0.001))).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp)


def _need(config: LlmConfig, name: str) -> float:
    value = getattr(config, name)
    if value is None:
        raise ConfigError(f"llm.rope_type={config.rope_type!r} needs llm.{name}")
    return float(value)
