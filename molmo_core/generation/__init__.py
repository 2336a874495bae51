"""Text generation: sampling and beam search over a key/value cache."""

from molmo_core.generation.generate import generate
from molmo_core.generation.kv_cache import KVCache

__all__ = ["KVCache", "generate"]
