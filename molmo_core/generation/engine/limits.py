"""Sizes of an engine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """Sizes of an engine."""

    max_running: int = 64
    """Answers in work at once; others wait."""
    prefill_tokens: int = 8192
    """Tokens of prompts that a step reads at most, padding included, so that answers in work do not wait long."""
    slice_tokens: int | None = 4096
    """While answers are in work, a step gives prompts about as much work as reading this many tokens is: some crops of their media, or some
    layers of all their tokens. So nobody waits long for a prompt that must not be cut either. None: what is planned is read in one step."""
    cache_bytes: int | None = None
    """Memory for keys and values; None: on a GPU most of what is free, elsewhere 1 GiB."""
    feature_bytes: int = 256 << 20
    """Memory for the features of media that were seen already."""
    page_size: int = 64
    """Tokens of a page of the cache: a power of two of at least 16 on a GPU."""
    graphs: bool = True
    """On a GPU: decode by CUDA graphs."""
    overlap: bool = True
    """With graphs: launch a step before the tokens of the last one were read."""
    speculate: int = 0
    """Tokens that are proposed at most for an answer in a step (`prompt_lookup.py`), if its most probable tokens are taken as they are;
    0: none. Nothing runs ahead then, because what is proposed depends on the last token."""
