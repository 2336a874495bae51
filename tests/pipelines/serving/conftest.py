"""A chat service without Serve: the model's own preprocessing in front, a script behind."""

import pytest

from molmo_core.registry import BaseModelConfig
from pipelines.serving.chat import ChatService
from pipelines.serving.config import ServeConfig
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
