"""Molmo: images and text in, text out."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule

from molmo_core.model_configs.molmo import MolmoConfig
from molmo_core.models.base import ModelBase
from molmo_core.models.image_inputs import FeatureTarget, add_features, as_batch, pooled_idx_of_tokens, tokens_of_input_idx
from molmo_core.models.token_inputs import check_shapes, default_positions, last_positions, response_tokens, valid_tokens
from molmo_core.nn.attention import Attention, Cached, Mask, Whole
from molmo_core.nn.connector import MolmoVisionBackbone
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import BlockInputs, Transformer, TransformerOutput
from molmo_core.nn.loss import LossSums, chunked_loss_sums, loss_sums, loss_weights
from molmo_core.nn.sequence_layout import sequence_layout
from molmo_core.outputs import OLMoOutput


class Encoded(NamedTuple):
    """What `Molmo.encode` gives."""

    blocks: TransformerOutput
    attentions: dict[int, torch.Tensor] | None = None
    """Attention weights by layer, if asked for."""
    loss: torch.Tensor | None = None
    """Scalar added to the loss."""
    metrics: dict[str, torch.Tensor] = {}  # noqa: RUF012 - never changed in place
    internal: dict[str, torch.Tensor] | None = None


class Molmo(ModelBase):
    """Vision backbone, language model, and the image features that are added to the embeddings of their tokens."""

    config: MolmoConfig
    FEATURES: ClassVar[tuple[str, ...]] = ()
    """Further inputs of `forward`, of other models of the family."""

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.transformer = Transformer(config.llm)
        self.vision_backbone = None if config.vision_backbone is None else MolmoVisionBackbone(config.vision_backbone, config.llm)
        if self.device.type != "meta":
            self.reset_parameters()

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
        append_last_valid_logits: torch.Tensor | None = None,
        return_logits: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
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
            append_last_valid_logits: int64 [B]: logits [B, 1, E] of these positions instead.
            return_logits: False: `logits` is empty [B, 0, E] and the loss is computed in chunks, without holding all logits.
            output_hidden_states: the outputs of all blocks, each [B, S, d].
            output_attentions: the attention weights of all blocks, each [B, H, S, K] (slow).
            loss_divisor: divides the weighted sum of the loss (default: the sum of the weights of this batch).
            z_loss_weight: factor of logsumexp², added to the cross entropy.
            metadata: ignored, so that a collated batch can be passed whole.
            features: inputs of other models of the family; an unknown one raises.

        Returns:
            Output with `loss` (scalar float32) and `metrics` (cross_entropy, z_loss, accuracy, loss_weight) if there are labels.

        Raises:
            ValueError: shapes that do not fit, or numbers of image tokens and features that differ.
        """
        batch = as_batch(
            {
                "input_ids": input_ids, "images": images, "image_masks": image_masks, "image_input_idx": image_input_idx, "labels": labels,
                "attention_mask": attention_mask, "pooled_patches_idx": pooled_patches_idx, "loss_masks": loss_masks,
                "position_ids": position_ids, "subsegment_ids": subsegment_ids, "response_mask": response_mask,
                "append_last_valid_logits": append_last_valid_logits, **features,
            },
            self.device,
        )  # fmt: skip
        unknown = [k for k, v in features.items() if k not in self.FEATURES and v is not None]
        if unknown:
            raise TypeError(f"{type(self).__name__}.forward got unknown input(s) {', '.join(unknown)}")
        check_shapes(batch)
        cache = KVCache.of(past_key_values) if use_cache or past_key_values is not None else None
        past = 0 if cache is None else cache.length
        valid = valid_tokens(batch["input_ids"], batch["attention_mask"], past)
        encoded = self.encode(batch, valid, response_tokens(batch), cache, output_hidden_states, output_attentions)
        select = batch["append_last_valid_logits"]
        if select is None and last_logits_only:
            select = last_positions(valid[:, past:])
        output = self.output(encoded, select, batch["labels"], batch["loss_masks"], return_logits, loss_divisor, z_loss_weight)
        return output._replace(past_key_values=cache if use_cache else None)

    # -- steps of forward, also for the other models of the family ------------------------------------------------------

    def encode(
        self,
        batch: dict[str, Any],
        valid: torch.Tensor,
        response: torch.Tensor | None,
        cache: KVCache | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> Encoded:
        """From the inputs of `forward` to the last hidden state.

        Args:
            batch: tensors by name; absent ones are None.
            valid: bool [B, P + S], real tokens of cache and call.
            response: bool [B, S], tokens of answers.
            cache: receives this call's keys and values.
        """
        ids, past = batch["input_ids"], 0 if cache is None else cache.length
        x = self.embed_tokens(ids.masked_fill(~valid[:, past:], 0).clamp(min=0))
        x = self.add_images(x, batch, first_call=past == 0)
        positions = default_positions(valid, past) if batch["position_ids"] is None else batch["position_ids"].clamp(min=0)
        weights: dict[int, torch.Tensor] | None = {} if output_attentions else None
        attention = self.attention(self.attention_mask(batch, valid, past, response), cache, weights)
        shared = BlockInputs(attention, response, None, valid[:, past:])
        return Encoded(self.transformer.run_blocks(self.transformer.prepare(x), positions, shared, output_hidden_states), weights)

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, S, d] of token ids int64 [B, S], without padding ids."""
        return self.transformer.wte(ids)

    def feature_targets(self, batch: dict[str, Any]) -> list[FeatureTarget]:
        """Which patches become which tokens, from the inputs of `forward`; a model with other index tensors overrides this."""
        if batch["images"] is None:
            return []
        tokens, idx = self.config.image_tokens, batch["pooled_patches_idx"]
        if idx is None and batch["image_input_idx"] is not None:
            vit = self.config.image_settings()
            return [tokens_of_input_idx(batch["image_input_idx"], batch["images"].shape[1], vit.crop_grid)]
        if idx is None:
            idx = pooled_idx_of_tokens(batch["input_ids"], batch["images"].shape[1], tokens, self.config.image_settings())
        return [FeatureTarget(idx, token_id=tokens.patch)]

    def add_images(self, x: torch.Tensor, batch: dict[str, Any], first_call: bool = True) -> torch.Tensor:
        """Adds the image features to the embeddings x [B, S, d].

        In training the vision tower runs in every step, on a blank crop if the batch has no image: under FSDP its parameters are
        gathered by all ranks together, so none may skip it.
        """
        targets = self.feature_targets(batch)
        if self.vision_backbone is None:
            if batch["images"] is not None:
                raise ValueError("images were given to a text-only model (vision_backbone is null)")
            return x
        if targets:
            results = self.vision_backbone(batch["images"], batch["image_masks"], *(t.pooled_idx for t in targets))
            for target, (features, present) in zip(targets, results):
                x = add_features(x, batch["input_ids"], features, present, target)
        elif first_call and (self.training or isinstance(self, FSDPModule)):
            x = x + self.vision_backbone.blank_features(x.shape[0]).to(x.dtype) * 0
        return x

    def attention(self, mask: Mask, cache: KVCache | None = None, weights: dict[int, torch.Tensor] | None = None) -> Attention:
        """What the blocks are handed (see `Whole` for `weights`)."""
        whole = Whole(mask, self.config.llm.attention_dropout if self.training else 0.0, weights)
        return whole if cache is None else Cached(cache, whole)

    def attention_mask(self, batch: dict[str, Any], valid: torch.Tensor, past: int, response: torch.Tensor | None) -> Mask:
        """The mask of the blocks, from the inputs of `forward`."""
        given, ids = batch["attention_mask"], batch["input_ids"]
        if given is not None and given.dim() == 4:
            return given
        implementation = self.attention_implementation
        if implementation == "auto":
            implementation = "flex" if self.training and ids.is_cuda else "sdpa"
        queries = ids.shape[1]
        # Without padding the plain causal kernel serves; a single query needs no look (nor a wait for the device).
        if (given is None and past) or (queries > 1 and implementation == "sdpa" and bool(valid.all())):
            padding = None
        else:
            padding = valid
        layout = sequence_layout(ids, self.config.image_tokens, self.config.bi_directional_attn, None, batch["subsegment_ids"], response)
        layout = dataclasses.replace(layout.after(past), valid=padding)
        return layout.mask(ids.shape[0], past + queries, queries, ids.device, implementation)

    def output(
        self,
        encoded: Encoded,
        select: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_masks: torch.Tensor | None,
        return_logits: bool = True,
        loss_divisor: torch.Tensor | float | None = None,
        z_loss_weight: float = 0.0,
    ) -> OLMoOutput:
        """Logits, loss and metrics from what `encode` gives (other arguments as in `forward`; select int64 [B])."""
        blocks, hidden = encoded.blocks, encoded.blocks.hidden
        if select is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), select][:, None]
        logits = self.transformer.logits(hidden) if return_logits else hidden.new_empty(len(hidden), 0, self.config.llm.embedding_rows)
        loss, metrics = None, self._router_metrics(blocks) | encoded.metrics
        if labels is not None:
            if labels.shape != blocks.hidden.shape[:2] or select is not None:
                raise ValueError(f"labels {tuple(labels.shape)} must fit the logits of all {tuple(blocks.hidden.shape[:2])} positions")
            weights = loss_weights(labels, loss_masks).flatten()
            if return_logits:
                sums = loss_sums(logits.flatten(0, 1), labels.flatten(), weights)
            else:
                sums = chunked_loss_sums(self.transformer.logits, hidden.flatten(0, 1), labels.flatten(), weights)
            loss = self._loss(sums, weights.sum(), loss_divisor, z_loss_weight, metrics)
            loss = loss if encoded.loss is None else loss + encoded.loss
        return OLMoOutput(
            logits=logits,
            loss=loss,
            hidden_states=tuple(blocks.hidden_states) or None,
            attentions=tuple((encoded.attentions or {}).values()) or None,
            metrics=metrics or None,
            internal=encoded.internal,
        )

    def _loss(
        self, sums: LossSums, weight: torch.Tensor, divisor: torch.Tensor | float | None, z_weight: float, metrics: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The loss to minimise; adds what it consists of to `metrics` (means over this batch, without gradient)."""
        own = weight.clamp(min=1e-6)
        cross_entropy, z, correct = (s.detach() / own for s in sums)
        loss = (sums.cross_entropy + z_weight * sums.z) / (own if divisor is None else divisor)
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
