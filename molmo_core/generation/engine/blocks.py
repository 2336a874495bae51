"""The blocks of a model as the engine runs them, without gradient: as they are, compiled on a GPU; or by kernels where these fit."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from molmo_core.generation.engine.paged import PagedCache, Stored
from molmo_core.generation.engine.slices import Slices, finish
from molmo_core.nn.attention import Attention
from molmo_core.nn.llm import Block, BlockInputs, MoEBlock, Pass
from molmo_core.nn.rope import Rotary, rotary_tables
from molmo_core.nn.vit import VitBlock

POSITION_SHARE = 2
"""Rotary positions that are taken, in lengths of the longest sequence: they may run ahead of the tokens (HeMolmo leaves some out)."""


class PagedAttention(Protocol):
    """Attention of the tokens of a step, whose keys and values go to pages."""

    def of(self, layer: int) -> Attention:
        """For a block: stores keys and values, and attends."""

    def stored(self, layer: int) -> Stored:
        """Where keys and values go."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, H, D], k, v [T, H_kv, D], which are stored already -> [T, H · D]."""


class Blocks:
    """All blocks of the language model, and its head.

    A compiled block must not know its number, or each would be compiled for itself: it is handed the attention of its own layer.
    """

    def __init__(self, model: Any, dynamic: bool | None):
        """`dynamic`: as for `torch.compile`; with True one compilation serves any number of tokens."""
        self.transformer = model.transformer
        self._step: Any = _step
        self._head: Any = _head
        if next(model.parameters()).is_cuda:
            self._step = torch.compile(_step, dynamic=dynamic)
            self._head = torch.compile(_head, dynamic=None)

    def __call__(self, tokens: Pass, attention: PagedAttention, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden state behind the last block, [T, d], of all tokens or of some, int64 [n]."""
        return finish(self.slices(tokens, attention, rows, len(self.transformer.blocks)))

    def slices(self, tokens: Pass, attention: PagedAttention, rows: torch.Tensor | None, layers: int) -> Slices[torch.Tensor]:
        """The same with a pause after every `layers` blocks."""
        x = self.transformer.first_hidden(tokens.x)
        rotary = rotary_tables(self.transformer.config, tokens.positions)
        for layer, block in enumerate(self.transformer.blocks):
            if layer and layer % layers == 0:
                yield
            x = self._step(block, x, rotary[layer], attention.of(layer), tokens.scale)
        x = x.flatten(0, 1)
        return x if rows is None else x[rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, E], of [n, d]."""
        return self._head(self.transformer, hidden)  # type: ignore[no-any-return]


class FusedBlocks:
    """The same for blocks with fused projections, norms before the branches and none or one a head on queries and keys."""

    def __init__(self, model: Any):
        self.transformer = model.transformer
        config, device = model.config.llm, next(model.parameters()).device
        every = rotary_tables(config, torch.arange(POSITION_SHARE * config.max_sequence_length, device=device)[None])
        half = config.head_width // 2
        tables = {id(cos): tuple(t[0, 0, :, :half].contiguous() for t in (cos, sin)) for cos, sin in every}
        self._rotary = [tables[id(cos)] for cos, _ in every]

    @staticmethod
    def fit(model: Any, cache: PagedCache) -> bool:
        """Whether kernels do what the blocks of this model do."""
        config = model.config.llm
        known = all(type(block) in (Block, MoEBlock) for block in model.transformer.blocks)
        norm = config.attention_layer_norm_type if config.attention_layer_norm else None
        return cache.has_kernels and known and not config.norm_after and config.clip_qkv is None and norm in (None, "qwen3")

    def __call__(self, tokens: Pass, attention: PagedAttention, rows: torch.Tensor | None = None) -> torch.Tensor:
        """See `Blocks`; of the last block, only what is asked for goes on behind the attention."""
        return finish(self.slices(tokens, attention, rows, len(self.transformer.blocks)))

    def slices(self, tokens: Pass, attention: PagedAttention, rows: torch.Tensor | None, layers: int) -> Slices[torch.Tensor]:
        """See `Blocks`."""
        from molmo_core.generation.engine.block_kernels import RotaryTable, add_norm, rotate_and_store  # Triton is there with a GPU only

        x = self.transformer.first_hidden(tokens.x).flatten(0, 1)
        positions = tokens.positions.flatten()
        scale = None if tokens.scale is None else tokens.scale.flatten()
        branch = None
        for layer, block in enumerate(self.transformer.blocks):
            if layer and layer % layers == 0:
                yield
            qkv = block.att_proj(add_norm(x, branch, block.attn_norm.weight, block.attn_norm.eps))
            norms = (block.q_norm.weight, block.k_norm.weight) if hasattr(block, "q_norm") else None
            rotary = RotaryTable(*self._rotary[layer])
            q, k, v = rotate_and_store(qkv, norms, block.attn_norm.eps, rotary, positions, scale, attention.stored(layer))
            out = attention.attend(layer, q, k, v)
            if rows is not None and layer == len(self.transformer.blocks) - 1:
                x, out = x[rows], out[rows]
            branch = _feed_forward(block, add_norm(x, block.attn_out(out), block.ff_norm.weight, block.ff_norm.eps))
        return x if branch is None else x + branch

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Blocks`."""
        from molmo_core.generation.engine.block_kernels import add_norm

        norm = self.transformer.ln_f
        return self.transformer.head(add_norm(hidden, None, norm.weight, norm.eps)).float()  # type: ignore[no-any-return]


def blocks_of(model: Any, cache: PagedCache, dynamic: bool | None) -> Blocks | FusedBlocks:
    """The fastest for a model; `dynamic`: see `Blocks`."""
    return FusedBlocks(model) if FusedBlocks.fit(model, cache) else Blocks(model, dynamic)


def compile_vision(model: Any) -> None:
    """Compiles the blocks of the vision encoder for any number of crops."""
    for module in model.modules():
        if isinstance(module, VitBlock):
            module.compile(dynamic=True)


def _step(block: Any, x: torch.Tensor, rotary: Rotary, attention: Attention, scale: torch.Tensor | None) -> torch.Tensor:
    return block(x, rotary, BlockInputs(attention, value_scale=scale), 0).hidden


def _head(transformer: Any, hidden: torch.Tensor) -> torch.Tensor:
    return transformer.logits(hidden).float()


def _feed_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
    from molmo_core.generation.engine.block_kernels import swiglu

    if isinstance(block, MoEBlock):
        return block.ffn(x[None], None)[0][0]  # type: ignore[no-any-return]
    return block.ff_out(swiglu(block.ff_proj(x)))  # type: ignore[no-any-return]
