"""Text generation: sampling and beam search over a key/value cache."""

from molmo_core.generation.generate import generate

__all__ = ["generate"]
