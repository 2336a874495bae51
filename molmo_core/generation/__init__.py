"""Text generation: sampling, beam search, streaming."""

from molmo_core.generation.generate import GenerationStep, generate, generate_stream
from molmo_core.generation.kv_cache import KVCache

__all__ = ["GenerationStep", "KVCache", "generate", "generate_stream"]
