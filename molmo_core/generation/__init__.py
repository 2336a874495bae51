"""Text generation: sampling and beam search over a key/value cache; `engine` for many answers at once."""
