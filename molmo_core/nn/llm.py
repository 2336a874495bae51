"""The language model: `transformer.{wte, blocks, ln_f, ff_out}`, for Qwen2, Qwen3, OLMo, OLMoE and Llama styles."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from molmo_core.nn.attention import Attention, Cached
from molmo_core.nn.configs import LlmConfig
from molmo_core.nn.linear import Linear
from molmo_core.nn.loss import LossSums, chunked_loss_sums
from molmo_core.nn.mlp import fused_swiglu
from molmo_core.nn.moe import MixtureOfExperts, RouterLosses
from molmo_core.nn.norm import RMSNorm
from molmo_core.nn.recompute import Recompute, recomputed
from molmo_core.nn.rope import Rotary, apply_rotary, rotary_tables


class TokenEmbedding(nn.Module):
    """Two tables: `embedding` [E, d] of the text vocabulary and `new_embedding` [additional, d]; id E + k is row k of the second."""

    def __init__(self, config: LlmConfig):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.embedding_rows, config.d_model))
        self.new_embedding = nn.Parameter(torch.empty(config.additional_vocab_size, config.d_model))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, S] in [0, E + additional) -> [B, S, d]."""
        rows = self.embedding.shape[0]
        text = F.embedding(ids.clamp(max=rows - 1), self.embedding)
        special = F.embedding((ids - rows).clamp(min=0), self.new_embedding)
        return torch.where((ids < rows)[..., None], text, special)


class OutputHead(Linear):
    """Logits of the text vocabulary and of the additional tokens, whose rows `new_weight` [additional, d] stand apart."""

    def __init__(self, config: LlmConfig):
        super().__init__(config.d_model, config.embedding_rows, bias=False)
        self.new_weight = nn.Parameter(torch.zeros(config.additional_vocab_size, config.d_model))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., E + additional]."""
        return torch.cat((super().forward(x), F.linear(x, self.new_weight)), -1)


class Pass(NamedTuple):
    """What the blocks run over: one entry a token."""

    x: torch.Tensor
    """[B, S, d], embeddings with image features."""
    positions: torch.Tensor
    """int64 [B, S], rotary positions."""
    valid: torch.Tensor | None = None
    """bool [B, S]: real tokens, the ones that router losses count (None: all)."""
    response: torch.Tensor | None = None
    """bool [B, S]: tokens of answers, for `response_residual_dropout`."""
    scale: torch.Tensor | None = None
    """float [B, S]: factors of the attention values of the tokens (HeMolmo)."""

    def part(self, first: int, last: int) -> Pass:
        """The tokens first..last."""
        return Pass(*(None if t is None else t[:, first:last] for t in self))  # type: ignore[arg-type]


class BlockInputs(NamedTuple):
    """What every block of a forward pass shares, besides the hidden state."""

    attention: Attention
    response_mask: torch.Tensor | None = None
    """bool [B, S]: tokens of answers, for `response_residual_dropout`."""
    value_scale: torch.Tensor | None = None
    """float [B, S]: factors of the attention values of the tokens (HeMolmo)."""
    valid: torch.Tensor | None = None
    """bool [B, S]: real tokens, the ones that router losses count (None: all)."""


class BlockOutput(NamedTuple):
    """Hidden state [B, S, d]; router losses of a mixture of experts."""

    hidden: torch.Tensor
    router: RouterLosses | None


class Block(nn.Module):
    """A transformer block with fused projections (`block_type: sequential`); base of the other kinds."""

    def __init__(self, config: LlmConfig):
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
        self.widths = (queries, keys, keys)
        self._build_projections()
        self.attn_out = Linear(queries, config.d_model, bias=False)
        self.attn_norm = RMSNorm(config.d_model, config.layer_norm_eps)
        self.ff_norm = RMSNorm(config.d_model, config.layer_norm_eps)
        if config.attention_layer_norm:
            per_head = config.attention_layer_norm_type == "qwen3"
            self.q_norm = RMSNorm(config.head_width if per_head else queries, config.layer_norm_eps)
            self.k_norm = RMSNorm(config.head_width if per_head else keys, config.layer_norm_eps)

    def _build_projections(self) -> None:
        config = self.config
        self.att_proj = Linear(config.d_model, sum(self.widths), bias=config.qkv_bias)
        self.ff_proj = Linear(config.d_model, 2 * config.intermediate_size, bias=False)
        self.ff_out = Linear(config.intermediate_size, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Normal weights; the projections that end a branch are smaller, by sqrt(2 · layers)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                ends_branch = name in ("attn_out.weight", "ff_out.weight", "ffn.experts.mlp.w2")
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layers) if ends_branch else std)

    def forward(self, x: torch.Tensor, rotary: Rotary, inputs: BlockInputs, layer: int) -> BlockOutput:
        """One block.

        Args:
            x: [B, S, d].
            rotary: this layer's tables.
            inputs: what the blocks share.
            layer: index of this block.

        Raises:
            ValueError: activation checkpointing and a cache: recomputation would add to the cache again.
        """
        if self.recompute != "none" and self.training and torch.is_grad_enabled():
            if isinstance(inputs.attention, Cached):
                raise ValueError(
                    "a key/value cache cannot be used in training with activation checkpointing; use torch.no_grad() or eval()"
                )
            return recomputed(lambda x: self._run(x, rotary, inputs, layer), x, self.recompute)
        return self._run(x, rotary, inputs, layer)

    def _run(self, x: torch.Tensor, rotary: Rotary, inputs: BlockInputs, layer: int) -> BlockOutput:
        after = self.config.norm_after
        branch = self._attention(x if after else self.attn_norm(x), rotary, inputs, layer)
        x = x + self._dropout(self.attn_norm(branch) if after else branch, inputs.response_mask)
        branch, router = self._feed_forward(x if after else self.ff_norm(x), inputs)
        x = x + self._dropout(self.ff_norm(branch) if after else branch, inputs.response_mask)
        return BlockOutput(x, router)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.att_proj(x).split(self.widths, dim=-1)

    def _feed_forward(self, x: torch.Tensor, inputs: BlockInputs) -> tuple[torch.Tensor, RouterLosses | None]:
        return self.ff_out(fused_swiglu(self.ff_proj(x))), None

    def _attention(self, x: torch.Tensor, rotary: Rotary, inputs: BlockInputs, layer: int) -> torch.Tensor:
        config = self.config
        q, k, v = self._project(x)
        if config.clip_qkv is not None:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        norm = config.attention_layer_norm_type if config.attention_layer_norm else None
        if norm == "olmo":
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        q, k, v = (t.unflatten(-1, (-1, config.head_width)).transpose(1, 2) for t in (q, k, v))
        if norm == "qwen3":
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        if inputs.value_scale is not None:
            v = v * inputs.value_scale[:, None, :, None].to(v.dtype)
        return self.attn_out(inputs.attention(layer, q, k, v).transpose(1, 2).flatten(-2))

    def _dropout(self, x: torch.Tensor, response_mask: torch.Tensor | None) -> torch.Tensor:
        """Residual dropout, with its own probability on the tokens of answers if configured."""
        p, p_response = self.config.residual_dropout, self.config.response_residual_dropout
        if not self.training or (p == 0 and p_response == 0):
            return x
        if p_response == 0:
            return F.dropout(x, p)
        if response_mask is None:
            raise ValueError("llm.response_residual_dropout > 0 needs response_mask (or loss_masks) in training")
        keep = torch.where(response_mask, 1 - p_response, 1 - p)[..., None].to(x.dtype).expand_as(x)
        return x * torch.bernoulli(keep) / keep


class LlamaBlock(Block):
    """Separate projections (`block_type: llama`)."""

    def _build_projections(self) -> None:
        config = self.config
        self.q_proj, self.k_proj, self.v_proj = (Linear(config.d_model, width, bias=config.qkv_bias) for width in self.widths)
        self.ff_proj1 = Linear(config.d_model, config.intermediate_size, bias=False)
        self.ff_proj2 = Linear(config.d_model, config.intermediate_size, bias=False)
        self.ff_out = Linear(config.intermediate_size, config.d_model, bias=False)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _feed_forward(self, x: torch.Tensor, inputs: BlockInputs) -> tuple[torch.Tensor, RouterLosses | None]:
        return self.ff_out(F.silu(self.ff_proj1(x)) * self.ff_proj2(x)), None


class MoEBlock(Block):
    """Fused q/k/v and a mixture of experts (`block_type: moe`)."""

    def _build_projections(self) -> None:
        self.att_proj = Linear(self.config.d_model, sum(self.widths), bias=self.config.qkv_bias)
        self.ffn = MixtureOfExperts(self.config)

    def _feed_forward(self, x: torch.Tensor, inputs: BlockInputs) -> tuple[torch.Tensor, RouterLosses | None]:
        return self.ffn(x, inputs.valid)


BLOCKS: dict[str, type[Block]] = {"sequential": Block, "llama": LlamaBlock, "moe": MoEBlock}


class TransformerOutput(NamedTuple):
    """Result of the blocks: final hidden state before `ln_f`; per-layer lists, empty unless asked for."""

    hidden: torch.Tensor
    hidden_states: list[torch.Tensor]
    router: list[RouterLosses]


class Transformer(nn.Module):
    """Embedding, blocks, final norm and output head. The pieces are methods, because image features enter between them."""

    def __init__(self, config: LlmConfig):
        super().__init__()
        self.config = config
        self.wte = TokenEmbedding(config)
        self.blocks = nn.ModuleList(BLOCKS[config.block_type](config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.layer_norm_eps)
        if not config.weight_tying:
            extra = config.can_predict_extra_tokens
            self.ff_out = OutputHead(config) if extra else Linear(config.d_model, config.embedding_rows, bias=False)

    def reset_parameters(self) -> None:
        std = self.config.initializer_range
        nn.init.normal_(self.wte.embedding, std=std)
        nn.init.normal_(self.wte.new_embedding, std=self.config.new_embedding_init_range)
        self.ln_f.reset_parameters()
        for block in self.blocks:
            block.reset_parameters()  # type: ignore[operator]
        if not self.config.weight_tying:
            nn.init.normal_(self.ff_out.weight, std=std)
            if isinstance(self.ff_out, OutputHead):
                nn.init.zeros_(self.ff_out.new_weight)

    def first_hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The hidden state before the first block, from the embeddings (with image features)."""
        x = F.dropout(x, self.config.embedding_dropout, self.training)
        return x * self.config.d_model**0.5 if self.config.normalize_input_embeds else x

    def run_blocks(
        self, tokens: Pass, attention: Attention, output_hidden_states: bool = False, layers: range | None = None
    ) -> TransformerOutput:
        """Runs blocks.

        Args:
            tokens: their x is the hidden state before the first of these blocks (see `first_hidden`).
            attention: attention of these tokens.
            output_hidden_states: collect the output of every block.
            layers: the blocks to run (default all).
        """
        tables = rotary_tables(self.config, tokens.positions)
        shared = BlockInputs(attention, tokens.response, tokens.scale, tokens.valid)
        x, out = tokens.x, TransformerOutput(tokens.x, [], [])
        for layer in range(self.config.n_layers) if layers is None else layers:
            x, router = self.blocks[layer](x, tables[layer], shared, layer)
            if output_hidden_states:
                out.hidden_states.append(x)
            if router is not None:
                out.router.append(router)
        return out._replace(hidden=x)

    def loss_sums(self, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_weight: float) -> LossSums:
        """The loss of positions, without holding their logits: hidden [n, d], labels int64 [n], weights float32 [n]."""
        if self.config.weight_tying:
            matrices: list[Any] = [self.wte.embedding, self.wte.new_embedding]
        else:
            matrices = [self.ff_out.weight, getattr(self.ff_out, "new_weight", None)]
        matrices = matrices if self.config.can_predict_extra_tokens else matrices[:1]
        scale = self.config.d_model**-0.5 if self.config.scale_logits else 1.0
        return chunked_loss_sums(self.ln_f(hidden), matrices, labels, weights, z_weight, scale)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head: [..., d] -> [..., E]. The additional tokens have no logits (they are never generated) unless
        `can_predict_extra_tokens` gives them some: [..., E + additional]."""
        return self.head(self.ln_f(hidden))

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """`logits` of hidden states that went through the final norm."""
        if not self.config.weight_tying:
            logits = self.ff_out(normed)
        else:
            logits = F.linear(normed, self.wte.embedding)
            if self.config.can_predict_extra_tokens:
                logits = torch.cat((logits, F.linear(normed, self.wte.new_embedding)), -1)
        return logits / self.config.d_model**0.5 if self.config.scale_logits else logits
