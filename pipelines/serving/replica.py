"""The model as a Ray Serve deployment: an engine in a thread of its own, one asynchronous generator a request."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import torch

from molmo_core.checkpoint import load_model
from molmo_core.generation.sampling import SamplingConfig
from pipelines.model_folder import model_folder
from pipelines.serving.config import ServeConfig
from pipelines.serving.engine import Engine, Row

IDLE_WAIT_S = 0.2


class Piece(NamedTuple):
    """A part of an answer."""

    tokens: list[int]
    finish_reason: str | None
    """`stop` or `length` with the last part."""


class Replica:
    """One copy of the model."""

    def __init__(self, config: ServeConfig, model: str) -> None:
        """`model`: the checkpoint, with its version fixed (an alias may move while replicas start)."""
        device = "cuda" if config.gpus_per_replica else "cpu"
        self._config = config
        loaded = load_model(model_folder(model), getattr(torch, config.dtype), device)
        self._engine = Engine(loaded)
        self._waiting: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self, example: dict[str, Any], max_new_tokens: int, temperature: float, top_p: float, seed: int | None
    ) -> AsyncIterator[Piece]:
        """The answer to one preprocessed prompt, as it is generated. Closing the generator stops the work on it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int | None, str | None, Exception | None]] = asyncio.Queue()

        def emit(*event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        sampling = SamplingConfig(do_sample=temperature > 0, temperature=temperature, top_p=top_p)
        row = Row(example, max_new_tokens, sampling, seed, emit)
        self._waiting.put(row)
        try:
            piece = Piece([], None)
            while piece.finish_reason is None:
                ready = [await events.get()]
                while not events.empty():  # what has come meanwhile goes out as one part
                    ready.append(events.get_nowait())
                for _, _, error in ready:
                    if error is not None:
                        raise error
                piece = Piece([token for token, _, _ in ready if token is not None], ready[-1][1])
                yield piece
        finally:
            row.cancelled = True

    async def load(self) -> dict[str, int]:
        """Answers in work (`active`) and tokens generated since the start (`tokens`)."""
        return {"active": self._engine.active, "tokens": self._engine.tokens}

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the engine has stopped: {self._failure!r}")

    def __del__(self) -> None:
        self._closing.set()

    def _work(self) -> None:
        try:
            while not self._closing.is_set():
                self._engine.admit(self._arrived())
                self._engine.step()
        except BaseException as error:  # kept for check_health, which reports it
            self._failure = error
            raise

    def _arrived(self) -> list[Row]:
        """Requests to begin with: those there now; an idle engine waits for the first, and a little for others."""
        room = self._config.max_batch_size - self._engine.active
        rows: list[Row] = []
        deadline = time.monotonic() + (0 if self._engine.active else IDLE_WAIT_S)
        while len(rows) < room:
            try:
                rows.append(self._waiting.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
            if not self._engine.active and len(rows) == 1:
                deadline = time.monotonic() + self._config.batch_wait_ms / 1000
        return rows
