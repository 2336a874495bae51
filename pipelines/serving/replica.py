"""The model as a Ray Serve deployment: one copy of it, with an engine and its host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import torch

from molmo_core.checkpoint import load_model
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.requests import Request, SamplingParams
from pipelines.model_folder import model_folder
from pipelines.serving.config import ServeConfig
from pipelines.serving.host import Host
from pipelines.serving.pieces import Piece

__all__ = ["Piece", "Replica"]


class Replica:
    """One copy of the model."""

    def __init__(self, config: ServeConfig, model: str) -> None:
        """`model`: the checkpoint, with its version fixed (an alias may move while replicas start)."""
        device = "cuda" if config.gpus_per_replica else "cpu"
        engine = Engine(load_model(model_folder(model), getattr(torch, config.dtype), device), EngineLimits(config.max_batch_size))
        engine.warm_up()
        self._host = Host(engine, config.max_batch_size + config.max_queued_requests, config.batch_wait_ms / 1000)

    async def generate(self, example: dict[str, Any], params: SamplingParams) -> AsyncIterator[Piece]:
        """The answer to one preprocessed prompt, as it is generated. Closing the generator stops the work on it.

        Raises:
            ApiError: the queue is full.
        """
        pieces = self._host.answer(Request(example, params))
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    async def load(self) -> dict[str, int]:
        """Answers in work, requests that wait, tokens generated since the start (`Host.load`)."""
        return self._host.load()

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._host.check()

    def __del__(self) -> None:
        self._host.close()
