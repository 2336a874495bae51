"""Images that come over a network are fetched ahead, several at a time: waiting is most of what they cost."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.data.records.media import fetch
from pipelines.data.rejects import Rejected

THREADS = 16
_AHEAD = 32

Opened = dict[str, Any] | Rejected
"""An example whose media are still references, or why there is none."""


def fetched(examples: Iterable[Opened], pool: concurrent.futures.Executor) -> Iterator[Opened]:
    """The same examples in the same order, remote images as bytes; one that cannot be fetched is `Rejected`.

    Videos stay references: several in memory would be too much, and decoding one takes longer than fetching it.
    """
    waiting: collections.deque[Opened | concurrent.futures.Future[Opened]] = collections.deque()
    for example in examples:
        waiting.append(pool.submit(_fetch_images, example) if isinstance(example, dict) and _is_remote(example) else example)
        if len(waiting) > _AHEAD:
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _result(entry: Opened | concurrent.futures.Future[Opened]) -> Opened:
    return entry.result() if isinstance(entry, concurrent.futures.Future) else entry


def _is_remote(example: dict[str, Any]) -> bool:
    return any(isinstance(reference, str) and "://" in reference for reference in (example.get("image"), *(example.get("images") or ())))


def _fetch_images(example: dict[str, Any]) -> Opened:
    try:
        if "image" in example:
            return {**example, "image": fetch(example["image"])}
        return {**example, "images": [fetch(reference) for reference in example["images"]]}
    except Rejected as reason:
        return reason
