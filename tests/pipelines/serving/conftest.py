"""A chat service without Serve: the model's own preprocessing in front, a script behind."""

import asyncio

import pytest

from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.requests import Request
from molmo_core.registry import BaseModelConfig
from pipelines.serving.chat import ChatService
from pipelines.serving.config import ServeConfig
from pipelines.serving.host import Host
from pipelines.serving.pieces import Piece


class Scripted:
    """Pieces that were written beforehand."""

    def __init__(self, pieces):
        self._pieces = iter(pieces)
        self.cancelled = False

    async def __anext__(self):
        piece = next(self._pieces)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self):
        self.cancelled = True


@pytest.fixture(scope="session")
def golden_config(golden):
    """Configuration of a model with images, small vocabulary and a context of 2,048 tokens."""
    overrides = [f"llm.tokenizer.identifier={golden / 'tokenizer'}"]
    return BaseModelConfig.load(golden / "molmo-qwen2-clip/config.yaml", overrides)


@pytest.fixture
def scripted(golden_config):
    """`scripted(*pieces, **settings)`: a service whose answers are these pieces, and what it asked the model for."""

    def build(*pieces, **settings):
        asked = []

        def generate(*request):
            asked.append((request, Scripted(pieces or [Piece([5], "stop")])))
            return asked[-1][1]

        return ChatService(ServeConfig(**{"model": "m", "name": "m", **settings}), golden_config, generate), asked

    return build


class Local:
    """An answer of a host in this process."""

    def __init__(self, host, request):
        self._parts = asyncio.Queue()
        self._work = asyncio.ensure_future(host.answer(request, self._parts.put_nowait))
        self._work.add_done_callback(lambda work: work.cancelled() or self._parts.put_nowait(work.exception()))

    async def __anext__(self):
        part = await self._parts.get()
        if isinstance(part, Exception):
            raise part
        return part

    def cancel(self):
        self._work.cancel()


@pytest.fixture(scope="module")
def engined(tiny_model):
    """A service with a real engine: the tiny model's."""
    host = Host(Engine(tiny_model, EngineLimits(max_running=4, cache_bytes=32 << 20)), places=64, batch_wait_s=0.0)
    config = ServeConfig(model="m", name="m", max_new_tokens=12)
    yield ChatService(config, tiny_model.config, lambda example, params: Local(host, Request(example, params)))
    host.check()
    host.close()
