"""Noise of (seed, place in the answer, token): drawing is taking the largest of logits plus Gumbel noise."""

from __future__ import annotations

import numpy as np
import torch

MASK_32 = 0xFFFFFFFF


def keys_of(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [B], below 2^32: one key for each pair of uint64 seeds and places in an answer (from 1)."""
    mask = np.uint64(MASK_32)
    return _mix((seeds & mask) ^ _mix((seeds >> np.uint64(32)) ^ _mix(counts & mask))).astype(np.int64)


def token_bits(size: int, device: torch.device) -> torch.Tensor:
    """int64 [E], below 2^32: what sets the tokens apart."""
    return torch.arange(size, dtype=torch.int64, device=device) * 0x9E3779B9 & MASK_32


def noisy(logits: torch.Tensor, tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float64 [B, E]: logits float32 [B, E] plus the noise of tokens (`token_bits`) and keys int64 [B]."""
    bits = _mix_tensor(tokens ^ keys[:, None])
    uniform = (bits >> 8).double().add(0.5).mul(2.0**-24)  # in (0, 1)
    return logits.double() - (-uniform.log()).log()


def _mix(x: np.ndarray) -> np.ndarray:
    """A permutation of 32 bits in which every bit of the input changes half of the output (Wellons' lowbias32); of uint64."""
    mask = np.uint64(MASK_32)
    x = x ^ x >> np.uint64(16)
    x = x * np.uint64(0x7FEB352D) & mask
    x = x ^ x >> np.uint64(15)
    x = x * np.uint64(0x846CA68B) & mask
    return x ^ x >> np.uint64(16)


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`_mix` of int64 values below 2^32: their products stay below 2^63 as long as the factor is split."""
    x = x ^ x >> 16
    x = _times(x, 0x7FEB352D)
    x = x ^ x >> 15
    x = _times(x, 0x846CA68B)
    return x ^ x >> 16


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor modulo 2^32."""
    low, high = factor & 0xFFFF, factor >> 16
    return x * low + ((x * high & 0xFFFF) << 16) & MASK_32
