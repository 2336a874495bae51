"""Molmo: images and text in, text out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from molmo_core.inputs import Inputs, Targets, as_batch
from molmo_core.model_configs.molmo import MolmoConfig
from molmo_core.models.base import ModelBase
from molmo_core.models.image_features import FeatureTarget, add_features, check_target, pooled_idx_of_tokens, tokens_of_input_idx
from molmo_core.nn.attention import Attention, Cached, Mask, Whole
from molmo_core.nn.connector import MolmoVisionBackbone
from molmo_core.nn.context import Share
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import Pass, Transformer, TransformerOutput
from molmo_core.nn.loss import LossSums, loss_sums, loss_weights
from molmo_core.nn.sequence_layout import sequence_layout
from molmo_core.outputs import OLMoOutput

Look = Callable[..., list[tuple[torch.Tensor, torch.Tensor]]]
"""Images to features, as `MolmoVisionBackbone.forward`."""


class Embedded(NamedTuple):
    """What `Molmo.embed` gives: the tokens that the blocks have to run over, and what embedding itself found out."""

    tokens: Pass
    done: TransformerOutput | None = None
    """Outputs for tokens before these, which embedding ran already (their keys and values are in the cache that it was given)."""
    loss: torch.Tensor | None = None
    """Scalar added to the loss."""
    metrics: dict[str, torch.Tensor] = {}  # noqa: RUF012 - never changed in place
    internal: dict[str, torch.Tensor] | None = None
    kept: Any = None
    """What the `head` of a model has to know besides."""

    def joined(self, blocks: TransformerOutput) -> TransformerOutput:
        """The outputs of all tokens of the call, from those of `tokens`."""
        if self.done is None:
            return blocks
        states = [torch.cat((a, b), 1) for a, b in zip(self.done.hidden_states, blocks.hidden_states)]
        return blocks._replace(hidden=torch.cat((self.done.hidden, blocks.hidden), 1), hidden_states=states)


class Molmo(ModelBase):
    """Vision backbone, language model, and the image features that are added to the embeddings of their tokens."""

    config: MolmoConfig
    FEATURES: ClassVar[tuple[str, ...]] = ()
    """Further inputs of `forward`, of other models of the family."""
    FILLS_CACHE: ClassVar[bool] = False
    """Whether `embed` saves work if it is given a cache."""
    SHARES_CONTEXT: ClassVar[bool] = True
    """Whether ranks can share a sequence (`share_context`)."""

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.context: dist.ProcessGroup | None = None
        """The ranks that share sequences with this one (`share_context`)."""
        self.transformer = Transformer(config.llm)
        self.vision_backbone = None if config.vision_backbone is None else MolmoVisionBackbone(config.vision_backbone, config.llm)
        if self.device.type != "meta":
            ModelBase.reset_parameters(self)  # of the parts that exist by now; a subclass adds its own

    def forward(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        pooled_patches_idx: torch.Tensor | None = None,
        loss_masks: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        subsegment_ids: torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool = False,
        last_logits_only: bool = False,
        return_logits: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        loss_positions: torch.Tensor | None = None,
        loss_divisor: torch.Tensor | float | None = None,
        z_loss_weight: float = 0.0,
        metadata: Any = None,
        **features: torch.Tensor | None,
    ) -> OLMoOutput:
        """One pass over a batch.

        Tensors may be numpy arrays, and one example without batch axis is taken as a batch of one. B rows, S tokens of this call, P
        tokens already in the cache, K = P + S.

        Args:
            input_ids: int64 [B, S]; -1 is padding.
            images: patches [B, crops, patches, patch·patch·3] or pixels [B, crops, 3, H, W]; uint8 is normalised here, float is taken
                as normalised.
            image_masks: float [B, crops, patches], share of real pixels (encoders that pad).
            image_input_idx: index style of the first release: sequence positions [B, crops, cells], negative = skip.
            labels: int64 [B, S], the target of each position (already shifted); negative = none.
            attention_mask: [B, K], non-zero = real token (default: `input_ids != -1`, and all of the cache); or a finished mask, bool
                or additive [B, 1, S, K].
            pooled_patches_idx: int64 [B, n, k], patches of each image token, -1 = absent. If images come with neither index, it is
                rebuilt from the grid of image tokens.
            loss_masks: float [B, S], weights of the positions in the loss (default 1 where there is a label).
            position_ids: int64 [B, S], rotary positions (default: real tokens counted from 0).
            subsegment_ids: int64 [B, S], message trees and packs. Not together with a cache.
            response_mask: bool [B, S], tokens of answers (default `loss_masks > 0`): for response dropout and `image_to_question`.
            past_key_values: cache of a former call (`molmo_core.nn.kv_cache.KVCache`), or a list of (k, v) per layer.
            use_cache: return the cache with this call's keys and values. A list given is copied, a cache is updated.
            last_logits_only: logits [B, 1, E] of the last real token of each row.
            return_logits: False: `logits` is empty [B, 0, E] and the loss is computed in chunks, without holding all logits.
            output_hidden_states: the outputs of all blocks, each [B, S, d].
            output_attentions: the attention weights of all blocks, each [B, H, S, K] (slow).
            loss_positions: int64 [n], the positions with a weight among all [B · S] (`molmo_core.nn.loss.loss_positions`): without all
                logits only these are computed. Found here if the labels come from the host; None: all.
            loss_divisor: divides the weighted sum of the loss (default: the sum of the weights of this batch).
            z_loss_weight: factor of logsumexp², added to the cross entropy.
            metadata: ignored, so that a collated batch can be passed whole.
            features: inputs of other models of the family; an unknown one raises.

        Returns:
            Output with `loss` (scalar float32) and `metrics` (cross_entropy, z_loss, accuracy, loss_weight) if there are labels.

        Raises:
            ValueError: shapes that do not fit, or numbers of image tokens and features that differ.
        """
        keep = use_cache or past_key_values is not None or (self.FILLS_CACHE and not torch.is_grad_enabled())
        cache = KVCache.of(past_key_values) if keep else None
        given = {
            "input_ids": input_ids, "images": images, "image_masks": image_masks, "image_input_idx": image_input_idx, "labels": labels,
            "attention_mask": attention_mask, "pooled_patches_idx": pooled_patches_idx, "loss_masks": loss_masks,
            "position_ids": position_ids, "subsegment_ids": subsegment_ids, "response_mask": response_mask,
            "loss_positions": loss_positions,
        }  # fmt: skip
        inputs = self.inputs(given | features, 0 if cache is None else cache.length)
        targets = (
            None if inputs.labels is None else Targets(inputs.labels, inputs.loss_masks, loss_divisor, z_loss_weight, inputs.loss_positions)
        )
        weights: dict[int, torch.Tensor] | None = {} if output_attentions else None

        if self.context is not None and targets is not None and cache is None:
            embedded, attention, targets = self.shared(inputs, targets, self.context)
        else:
            embedded = self.embed(inputs, None if output_attentions else cache)
            attention = self.attention(inputs, embedded.tokens.x.shape[1], cache, weights)
        blocks = self.run(embedded.tokens, attention, output_hidden_states)
        output = self.head(embedded, blocks, targets, inputs.last_positions() if last_logits_only else None, return_logits)
        return output._replace(
            past_key_values=cache if use_cache else None, attentions=None if weights is None else tuple(weights.values())
        )

    # -- the steps of forward ------------------------------------------------------------------------------------------

    def inputs(self, given: Mapping[str, Any], past: int = 0) -> Inputs:
        """The inputs of `forward` by name, checked and on the device, for a call after `past` cached tokens.

        Raises:
            TypeError: an input that this model does not have.
            ValueError: a shape that does not fit the tokens.
        """
        inputs = Inputs.of(past, **as_batch(given, self.device))
        unknown = sorted(set(inputs.features) - set(self.FEATURES))
        if unknown:
            raise TypeError(f"{type(self).__name__}.forward got unknown input(s) {', '.join(unknown)}")
        return inputs

    def embed(self, inputs: Inputs, cache: KVCache | None = None, look: Look | None = None) -> Embedded:
        """Token embeddings with the image features added.

        Args:
            inputs: see `inputs`. Without images nothing here waits for the device.
            cache: where a model that has to run tokens first (`FILLS_CACHE`) may leave their keys and values; empty, if there are images.
            look: gives what `self.look` would give for the same arguments (default).
        """
        x = self.add_images(self.embed_tokens(inputs.token_ids), inputs, look)
        return Embedded(Pass(x, inputs.positions, inputs.real, inputs.response))

    def attention(
        self,
        inputs: Inputs,
        queries: int | None = None,
        cache: KVCache | None = None,
        weights: dict[int, torch.Tensor] | None = None,
    ) -> Attention:
        """Attention by the rule of this model, to all tokens of cache and call.

        Args:
            inputs: of the call.
            queries: how many tokens run, the last ones of the call (default all).
            cache: receives the keys and values; holds those of the tokens before.
            weights: see `Whole`.
        """
        whole = Whole(self.attention_mask(inputs, queries), self.config.llm.attention_dropout if self.training else 0.0, weights)
        return whole if cache is None else Cached(cache, whole)

    def run(self, tokens: Pass, attention: Attention, output_hidden_states: bool = False) -> TransformerOutput:
        """All blocks over what `embed` gave (or a part of the sequence, if the attention knows the rest)."""
        return self.transformer.run_blocks(tokens._replace(x=self.transformer.first_hidden(tokens.x)), attention, output_hidden_states)

    def head(
        self,
        embedded: Embedded,
        blocks: TransformerOutput,
        targets: Targets | None = None,
        select: torch.Tensor | None = None,
        return_logits: bool = True,
    ) -> OLMoOutput:
        """Logits; loss and metrics if there are targets.

        Args:
            embedded: what `embed` gave.
            blocks: what `run` gave for its tokens.
            targets: for the positions of all tokens.
            select: int64 [B], the position of each row whose logits [B, 1, E] are wanted (default all, [B, S, E]).
            return_logits: False: `logits` is empty and the loss is computed in chunks.
        """
        blocks = embedded.joined(blocks)
        hidden = blocks.hidden
        if select is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), select][:, None]
        logits = self.transformer.logits(hidden) if return_logits else hidden.new_empty(len(hidden), 0, self.config.llm.logit_rows)
        loss, metrics = None, self._router_metrics(blocks) | embedded.metrics
        if targets is not None:
            labels = targets.labels
            if labels.shape != blocks.hidden.shape[:2] or select is not None:
                raise ValueError(f"labels {tuple(labels.shape)} must fit the logits of all {tuple(blocks.hidden.shape[:2])} positions")
            weights = loss_weights(labels, targets.loss_masks).flatten()
            if return_logits:
                sums = loss_sums(logits.flatten(0, 1), labels.flatten(), weights, targets.z_loss_weight)
            else:
                h, y, w = hidden.flatten(0, 1), labels.flatten(), weights
                if targets.positions is not None:
                    h, y, w = (t.index_select(0, targets.positions) for t in (h, y, w))
                sums = self.transformer.loss_sums(h, y, w, targets.z_loss_weight)
            loss = self._loss(sums, weights.sum(), targets, metrics)
            loss = loss if embedded.loss is None else loss + embedded.loss
        hidden_states = tuple(blocks.hidden_states) or None
        return OLMoOutput(logits, loss, hidden_states=hidden_states, metrics=metrics or None, internal=embedded.internal)

    def share_context(self, group: dist.ProcessGroup) -> None:
        """From now on this rank does its part only of every batch with labels, which all ranks of `group` are given alike.

        `forward` then returns logits, hidden states, metrics and loss of this rank's tokens. The loss is the part's share of a mean over
        ranks: the mean over the group is the loss of the whole batch, and the mean of the gradients, which FSDP takes, its gradient.

        Raises:
            ValueError: a model that needs whole sequences.
        """
        if not self.SHARES_CONTEXT or self.config.llm.block_type == "moe":
            what = "a mixture of experts balances" if self.SHARES_CONTEXT else f"{type(self).__name__} chooses from"
            raise ValueError(f"context parallelism: {what} whole sequences, of which a rank would see a part only")
        self.context = group

    def shared(self, inputs: Inputs, targets: Targets, group: dist.ProcessGroup) -> tuple[Embedded, Attention, Targets]:
        """What `embed` and `attention` give, and the targets, for this rank's tokens (`molmo_core.nn.context`)."""
        if inputs.mask is not None:
            raise ValueError("ranks that share a sequence need to know which tokens are real; a finished attention mask does not tell")
        rows, length = inputs.input_ids.shape
        share = Share(group, length, inputs.input_ids.device)
        embedded = self.embed(inputs, look=None if self.vision_backbone is None else functools.partial(share.look, self.vision_backbone))
        layout = sequence_layout(
            inputs.input_ids, self.config.image_tokens, self.config.bi_directional_attn, inputs.valid, inputs.segments, inputs.response
        )
        whole = Whole(None, self.config.llm.attention_dropout if self.training else 0.0)
        attention = share.attention(layout, rows, whole, self.attention_kind(inputs))
        divisor = targets.divisor
        if divisor is None:
            divisor = loss_weights(targets.labels, targets.loss_masks).sum().clamp(min=1e-6) / share.ranks
        masks = None if targets.loss_masks is None else share.of(targets.loss_masks)
        targets = Targets(share.of(targets.labels), masks, divisor, targets.z_loss_weight)
        tokens = Pass(*(None if t is None else share.of(t) for t in embedded.tokens))  # type: ignore[arg-type]
        return embedded._replace(tokens=tokens), attention, targets

    # -- what they consist of, also for the other models of the family -------------------------------------------------

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, S, d] of token ids int64 [B, S], without padding ids."""
        return self.transformer.wte(ids)

    def feature_targets(self, inputs: Inputs, crops: int) -> list[FeatureTarget]:
        """Which patches become which tokens, of rows of `crops` crops; a model with other index tensors overrides this."""
        tokens, idx = self.config.image_tokens, inputs.pooled_patches_idx
        if idx is None and inputs.image_input_idx is not None:
            vit = self.config.image_settings()
            return [tokens_of_input_idx(inputs.image_input_idx, crops, vit.crop_grid)]
        if idx is None:
            idx = pooled_idx_of_tokens(inputs.input_ids, crops, tokens, self.config.image_settings())
        return [FeatureTarget(idx, token_id=tokens.patch)]

    def checked_targets(self, inputs: Inputs, crops: int, patches: int) -> list[FeatureTarget]:
        """`feature_targets` of inputs on the CPU, for `patches` of all crops of a row: there it is seen what a GPU would not tell.

        Raises:
            ValueError: a patch that is not there, or another number of tokens than of features.
        """
        targets = self.feature_targets(inputs, crops)
        for target in targets:
            check_target(inputs.input_ids, target, patches)
        return targets

    def add_images(self, x: torch.Tensor, inputs: Inputs, look: Look | None = None) -> torch.Tensor:
        """Adds the image features to the embeddings x [B, S, d].

        In training the vision tower runs in every step, on a blank crop if the batch has no image: under FSDP its parameters are
        gathered by all ranks together, so none may skip it.
        """
        if self.vision_backbone is None:
            if inputs.images is not None:
                raise ValueError("images were given to a text-only model (vision_backbone is null)")
            return x
        if inputs.images is not None:
            targets = self.feature_targets(inputs, inputs.images.shape[1])
            results = (look or self.look)(inputs.images, inputs.image_masks, *(t.pooled_idx for t in targets))
            for target, (features, present) in zip(targets, results):
                x = add_features(x, inputs.input_ids, features, present, target)
        elif self.stands_in(inputs):
            x = x + self.vision_backbone.blank_features(x.shape[0]).to(x.dtype) * 0
        return x

    def look(self, *arguments: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What `vision_backbone` gives for the same arguments."""
        assert self.vision_backbone is not None
        return self.vision_backbone(*arguments)

    def pooled(self, features: torch.Tensor, *pooled_idx: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What `look` makes of the patch features of all crops [B, patches, P]."""
        assert self.vision_backbone is not None
        return self.vision_backbone.pool(features, *pooled_idx)

    def stands_in(self, inputs: Inputs) -> bool:
        """Whether a call without images has to do what other ranks do with theirs."""
        return not inputs.past and (self.training or isinstance(self, FSDPModule))

    def attention_mask(self, inputs: Inputs, queries: int | None = None) -> Mask:
        """The mask of the last `queries` tokens of the call (default all) over all tokens of cache and call."""
        rows, length = inputs.input_ids.shape
        queries = length if queries is None else queries
        if inputs.mask is not None:
            return inputs.mask[:, :, -queries:]
        implementation = self.attention_kind(inputs)
        valid = inputs.valid
        # Without padding the plain causal kernel serves; a single query needs no look (nor a wait for the device).
        if valid is not None and queries > 1 and implementation == "sdpa" and bool(valid.all()):
            valid = None
        mode = self.config.bi_directional_attn if queries > 1 else None  # nothing is ahead of the last token
        layout = sequence_layout(inputs.input_ids, self.config.image_tokens, mode, None, inputs.segments, inputs.response)
        layout = dataclasses.replace(layout.after(inputs.past), valid=valid)
        return layout.mask(rows, inputs.past + length, queries, inputs.input_ids.device, implementation)

    def attention_kind(self, inputs: Inputs) -> Literal["sdpa", "flex"]:
        """The `attention_implementation`, decided for a call."""
        if self.attention_implementation != "auto":
            return self.attention_implementation
        return "flex" if self.training and inputs.input_ids.is_cuda else "sdpa"

    def _loss(self, sums: LossSums, weight: torch.Tensor, targets: Targets, metrics: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss to minimise; adds what it consists of to `metrics` (means over this batch, without gradient)."""
        own = weight.clamp(min=1e-6)
        cross_entropy, z, correct = (s / own for s in sums[1:])
        loss = sums.total / (own if targets.divisor is None else targets.divisor)
        llm = self.config.llm
        for name, factor in (("router_load_balancing", llm.moe_loss_weight), ("router_z", llm.moe_zloss_weight)):
            if factor and name in metrics:
                loss = loss + factor * metrics[name]
        metrics.update(cross_entropy=cross_entropy, z_loss=z, accuracy=correct, loss_weight=weight)
        for name in metrics:
            metrics[name] = metrics[name].detach()
        return loss

    def _router_metrics(self, blocks: TransformerOutput) -> dict[str, torch.Tensor]:
        if not blocks.router:
            return {}
        return {
            "router_load_balancing": torch.stack([r.load_balancing for r in blocks.router]).mean(),
            "router_z": torch.stack([r.z for r in blocks.router]).mean(),
        }
