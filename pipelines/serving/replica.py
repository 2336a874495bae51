"""The model as a Ray Serve deployment: one copy of it, with an engine and its host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from ray.serve.handle import DeploymentHandle

from molmo_core.checkpoint import load_model
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.quantization import quantise_blocks
from molmo_core.generation.engine.requests import Request, SamplingParams
from pipelines.model_folder import model_folder
from pipelines.serving.config import ServeConfig
from pipelines.serving.heap import freeze_heap
from pipelines.serving.host import Host
from pipelines.serving.metrics import EngineMetrics, Reporter
from pipelines.serving.pieces import Piece
from pipelines.serving.remote import process_name
from pipelines.serving.wire import Address, Outboxes

__all__ = ["Piece", "Replica"]


class Replica:
    """One copy of the model."""

    def __init__(self, config: ServeConfig, model: str, collector: DeploymentHandle[Any] | None = None) -> None:
        """
        Args:
            config: of the server.
            model: the checkpoint, with its version fixed (an alias may move while replicas start).
            collector: who is told of this replica's numbers (`metrics.Collector`); None outside of Serve.

        Raises:
            ValueError: this model, or this device, cannot be quantised or speculate as the configuration says.
        """
        device = "cuda" if config.gpus_per_replica else "cpu"
        loaded = load_model(model_folder(model), getattr(torch, config.dtype), device)
        if config.quantization == "float8":
            quantise_blocks(loaded)
        engine = Engine(loaded, EngineLimits(config.max_batch_size, speculate=config.speculate))
        engine.warm_up()
        self._host = Host(engine, config.max_batch_size + config.max_queued_requests, config.batch_wait_ms / 1000)
        self._outboxes = Outboxes()
        self._reporter = None
        if collector is not None:
            self._reporter = Reporter(collector, process_name(), EngineMetrics(config.served_name, lambda: engine.stats()._asdict()))
            freeze_heap()

    async def answer(
        self, example: dict[str, Any], params: SamplingParams, begun: tuple[Sequence[int], Sequence[int]], to: Address, number: int
    ) -> None:
        """Generates the answer to one preprocessed prompt; returns when it has ended. Cancelling this stops the work on it.

        Args:
            example: model inputs.
            params: how to answer.
            begun: tokens of the answer that another replica has generated, and what each stands for; it goes on behind them.
            to: the frontend that the tokens are sent to, as parts of the answer `number`.

        Raises:
            ApiError: the queue is full.
            OSError, ConnectionLost: the frontend is gone.
        """
        outbox = await self._outboxes.to(to)
        async with outbox.work():
            outbox.send(number, Piece([], None))  # from here on the frontend notices if this process ends
            await self._host.answer(Request(example, params, tuple(begun[0]), tuple(begun[1])), partial(outbox.send, number))

    async def load(self) -> dict[str, int]:
        """Answers in work, requests that wait, tokens generated since the start (`Host.load`)."""
        return self._host.load()

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._host.check()

    def __del__(self) -> None:
        self._host.close()
        if self._reporter is not None:
            self._reporter.close()
