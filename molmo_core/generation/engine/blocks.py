"""The blocks of a model as the engine runs them: without gradient, on a GPU compiled, one compilation for all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from molmo_core.nn.attention import Attention
from molmo_core.nn.llm import BlockInputs, Pass
from molmo_core.nn.rope import Rotary, rotary_tables
from molmo_core.nn.vit import VitBlock


class Blocks:
    """All blocks of the language model.

    A compiled block must not know its number, or each would be compiled for itself: it is handed the attention of its own layer.
    """

    def __init__(self, model: Any, dynamic: bool | None):
        """`dynamic`: as for `torch.compile`; with True one compilation serves any number of tokens."""
        self.transformer = model.transformer
        self._step: Any = _step
        if next(model.parameters()).is_cuda:
            self._step = torch.compile(_step, dynamic=dynamic)

    def __call__(self, tokens: Pass, attention: Callable[[int], Attention]) -> torch.Tensor:
        """The hidden state [B, S, d] behind the last block; `attention` gives that of a layer."""
        x = self.transformer.first_hidden(tokens.x)
        rotary = rotary_tables(self.transformer.config, tokens.positions)
        for layer, block in enumerate(self.transformer.blocks):
            x = self._step(block, x, rotary[layer], attention(layer), tokens.scale)
        return x


def _step(block: Any, x: torch.Tensor, rotary: Rotary, attention: Attention, scale: torch.Tensor | None) -> torch.Tensor:
    return block(x, rotary, BlockInputs(attention, value_scale=scale), 0).hidden


def compile_vision(model: Any) -> None:
    """Compiles the blocks of the vision encoder for any number of crops."""
    for module in model.modules():
        if isinstance(module, VitBlock):
            module.compile(dynamic=True)
