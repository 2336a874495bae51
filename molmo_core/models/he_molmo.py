"""HeMolmo: the question chooses which high-resolution image tokens the language model sees.

A first pass of the language model over the question and a low-resolution image scores the high-resolution tokens; the best K enter
the second pass, at rotary positions that tell where in the image they are. See `molmo_core.nn.token_selection`.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule

from molmo_core.model_configs.he_molmo import HeMolmoConfig
from molmo_core.models.image_inputs import FeatureTarget, add_features
from molmo_core.models.molmo import Encoded, Molmo
from molmo_core.models.video_olmo import share_low_embedding
from molmo_core.nn.attention import Cached
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import BlockInputs, TransformerOutput
from molmo_core.nn.sequence_layout import in_image
from molmo_core.nn.token_selection import Selection, TokenScoring, select_tokens


class _FirstPass(NamedTuple):
    """What the first pass over [B, S_low] leaves behind."""

    blocks: TransformerOutput
    cache: KVCache | None = None
    """Keys and values of all layers, if the second pass may go on from them."""
    ends: torch.Tensor | None = None
    """int64 [B], where the low-resolution image ends; -1 in rows without one."""


class HeMolmo(TokenScoring, Molmo):
    """Molmo with hierarchical token selection.

    `forward` takes what Molmo's does and, instead of `pooled_patches_idx`: `low_res_tokens_idx` int64 [B, n_low, k] and
    `high_res_tokens_idx` int64 [B, N, k], patches of the low-resolution tokens and of the candidates; `high_res_pos_ids` int64 [B, N],
    their places; `high_res_features_weights` float [B, K], 1 for each token to keep; `low_to_high` float [B, n_low·f·f, N]. The
    preprocessor gives all of them. `output.internal` holds `selected` int64 [B, K], `high_res_importance` [B, N] and
    `low_res_importance` [B, n_low, f·f]; in training `output.loss` includes the selection loss.

    Without gradients the second pass goes on from the keys and values of the first: the question and the low-resolution image never
    see what comes after them, so they are computed once. The published code computes them twice; the numbers are the same.
    """

    config: HeMolmoConfig
    FEATURES: ClassVar[tuple[str, ...]] = (
        "low_res_tokens_idx", "high_res_tokens_idx", "high_res_pos_ids", "high_res_features_weights", "low_to_high",
    )  # fmt: skip
    CONNECTOR: ClassVar[tuple[str, ...]] = (*Molmo.CONNECTOR, *(f"{name}." for name in TokenScoring.SCORER_LAYERS))

    def __init__(self, config: HeMolmoConfig):
        super().__init__(config)
        self.build_scorer(config.token_scorer, config.llm.d_model, config.low_res_layers, config.llm.layer_norm_eps)
        if self.device.type != "meta":
            self.reset_scorer()

    def reset_parameters(self) -> None:
        self.transformer.reset_parameters()
        if self.vision_backbone is not None:
            self.vision_backbone.reset_parameters()
        self.reset_scorer()

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.transformer.wte(share_low_embedding(ids, self.config.image_tokens) if self.config.shared_low_high_embedding else ids)

    def add_images(self, x: torch.Tensor, batch: dict[str, Any], first_call: bool = True) -> torch.Tensor:
        """Reached by batches without an image. As in Molmo, every rank does what ranks with images do: a first pass, and scoring."""
        x = super().add_images(x, batch, first_call)
        if first_call and (self.training or isinstance(self, FSDPModule)):
            token = x[:, :1] if self.config.token_scorer.bp_low_res_embed else x[:, :1].detach()
            positions = token.new_zeros(token.shape[:2], dtype=torch.int64)
            response = None if not self.training else torch.zeros_like(positions, dtype=torch.bool)
            shared = BlockInputs(self.attention(None), response)
            first = self._first_blocks(self.transformer.prepare(token), positions, shared, self.may_reuse_first_pass(batch))
            scorer = [p for name, p in self.named_parameters() if name.startswith(self.SCORER_LAYERS)]
            x = x + 0 * torch.stack([t.sum() for t in (*first.blocks.hidden_states, *scorer)]).sum()
        return x

    def encode(
        self,
        batch: dict[str, Any],
        valid: torch.Tensor,
        response: torch.Tensor | None,
        cache: KVCache | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> Encoded:
        if batch["images"] is None:
            return super().encode(batch, valid, response, cache, output_hidden_states, output_attentions)
        batch = self._checked(batch, cache)
        config, ids, tokens = self.config, batch["input_ids"], self.config.image_tokens
        assert self.vision_backbone is not None
        (low, low_present), (high, high_present) = self.vision_backbone(
            batch["images"], batch["image_masks"], batch["low_res_tokens_idx"], batch["high_res_tokens_idx"]
        )
        high = high * high_present[..., None]
        x = self.embed_tokens(ids.masked_fill(~valid, 0).clamp(min=0))
        x = add_features(x, ids, low, low_present, FeatureTarget(batch["low_res_tokens_idx"], token_id=tokens.low))
        positions = batch["position_ids"].clamp(min=0)

        first = self._first_pass(x, batch, valid, response, positions, output_attentions)
        assert first.ends is not None
        length = first.blocks.hidden.shape[1]
        scores, low_scores = self.score_candidates(
            first.blocks.hidden_states[: config.low_res_layers],
            token_positions(ids[:, :length] == tokens.low, low.shape[1]),
            (first.ends - 1).clamp(min=0),
            high,
            high_present,
            batch["low_to_high"],
        )
        slots = batch["high_res_features_weights"]
        scaled = config.token_scorer.selection_model != "random"
        selection = select_tokens(config.token_selector, scores, high_present, slots, self.training, scaled)

        x, positions, scale = self._place(x, positions, batch, high, selection)
        weights: dict[int, torch.Tensor] | None = {} if output_attentions else None
        blocks = self._second_pass(first, x, batch, valid, response, positions, scale, cache, output_hidden_states, weights)
        metrics = dict(selection.metrics)
        if selection.loss is not None:
            metrics["selection_loss"] = selection.loss.detach()
        internal = {"selected": selection.indices, "high_res_importance": scores.detach()}
        if low_scores is not None:
            internal["low_res_importance"] = low_scores.detach()
        return Encoded(blocks, weights, selection.loss, metrics, internal)

    def _first_pass(
        self,
        x: torch.Tensor,
        batch: dict[str, Any],
        valid: torch.Tensor,
        response: torch.Tensor | None,
        positions: torch.Tensor,
        output_attentions: bool,
    ) -> _FirstPass:
        """The language model over the question and the low-resolution image: x [B, S, d], with its features."""
        scorer = self.config.token_scorer
        end = batch["input_ids"] == self.config.image_tokens.end
        ends = torch.where(end.any(1), end.int().argmax(1), -1)
        length = int(ends.max()) + 1
        view, valid, response = _cut(batch, valid, response, 0, length)
        x, positions = x[:, :length], positions[:, :length]
        if scorer.unconditioned:
            image = in_image(view["input_ids"], self.config.image_tokens)
            x, valid = x * image[..., None], valid & image
        shared = BlockInputs(self.attention(self.attention_mask(view, valid, 0, response)), response, valid=valid)
        x = self.transformer.prepare(x if scorer.bp_low_res_embed else x.detach())
        keep = self.may_reuse_first_pass(batch) and not output_attentions
        return self._first_blocks(x, positions, shared, keep)._replace(ends=ends)

    def _first_blocks(self, x: torch.Tensor, positions: torch.Tensor, shared: BlockInputs, keep: bool) -> _FirstPass:
        """The blocks of the first pass; all of them, with their keys and values, if the second pass will go on from there."""
        if keep:
            cache = KVCache()
            shared = shared._replace(attention=Cached(cache, shared.attention))
            return _FirstPass(self.transformer.run_blocks(x, positions, shared, output_hidden_states=True), cache)
        scorer, layers = self.config.token_scorer, self.config.low_res_layers
        start, stop = scorer.bp_low_res_start, min(max(scorer.bp_low_res_end, scorer.bp_low_res_start), layers)
        hidden_states: list[torch.Tensor] = []
        for part, grad in ((range(start), False), (range(start, stop), True), (range(stop, layers), False)):
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                blocks = self.transformer.run_blocks(x, positions, shared, output_hidden_states=True, layers=part)
            x = blocks.hidden
            hidden_states += blocks.hidden_states
        return _FirstPass(blocks._replace(hidden_states=hidden_states))

    def may_reuse_first_pass(self, batch: dict[str, Any]) -> bool:
        """Whether the tokens of the first pass see the same in the second: no gradient, no dropout, nothing ahead, the question too."""
        mask = batch["attention_mask"]
        return (
            not torch.is_grad_enabled()
            and not self.training
            and not self.config.token_scorer.unconditioned
            and self.config.bi_directional_attn in (None, "within_image")
            and batch["subsegment_ids"] is None
            and (mask is None or mask.dim() == 2)
        )

    def _place(
        self, x: torch.Tensor, positions: torch.Tensor, batch: dict[str, Any], high: torch.Tensor, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The chosen candidates at their tokens: embeddings, positions and attention-value factors, [B, S, d], [B, S], [B, S]."""
        ids, patch = batch["input_ids"], self.config.image_tokens.patch
        found, wanted = (ids == patch).sum(1), (batch["high_res_features_weights"] > 0).sum(1)
        if not torch.equal(found, wanted):
            row = int((found != wanted).nonzero()[0, 0])
            raise ValueError(
                f"row {row}: {int(found[row])} image tokens (id {patch}) in input_ids, "
                f"but {int(wanted[row])} weights in high_res_features_weights"
            )
        slots = token_positions(ids == patch, selection.indices.shape[1])
        index = selection.indices.clamp(max=high.shape[1] - 1)
        chosen = high.gather(1, index[..., None].expand(-1, -1, high.shape[-1]))
        x = add_features(x, ids, chosen, selection.valid, FeatureTarget(selection.indices, positions=slots))
        moved = torch.where(selection.valid, batch["high_res_pos_ids"].gather(1, index), 0)
        positions = positions.scatter_add(1, slots.clamp(min=0), moved)
        if selection.importance is None:
            return x, positions, None
        ones = torch.ones(ids.shape, dtype=torch.float32, device=ids.device)
        factors = torch.where(selection.valid, selection.importance - 1, 0.0)
        return x, positions, ones.scatter_add(1, slots.clamp(min=0), factors)

    def _second_pass(
        self,
        first: _FirstPass,
        x: torch.Tensor,
        batch: dict[str, Any],
        valid: torch.Tensor,
        response: torch.Tensor | None,
        positions: torch.Tensor,
        scale: torch.Tensor | None,
        cache: KVCache | None,
        output_hidden_states: bool,
        weights: dict[int, torch.Tensor] | None,
    ) -> TransformerOutput:
        """The language model over the whole sequence, or over what follows the tokens that the first pass has done with."""
        done = 0
        if first.cache is not None and first.ends is not None:
            done = int(torch.where(first.ends >= 0, first.ends + 1, first.blocks.hidden.shape[1]).min())
            cache = KVCache() if cache is None else cache
            for layer, (k, v) in enumerate(first.cache):
                cache.update(layer, k[:, :, :done], v[:, :, :done])
        view, _, response = _cut(batch, valid, response, done, x.shape[1])
        attention = self.attention(self.attention_mask(view, valid, done, response), cache, weights)
        shared = BlockInputs(attention, response, None if scale is None else scale[:, done:], valid[:, done:])
        x = self.transformer.prepare(x[:, done:])
        blocks = self.transformer.run_blocks(x, positions[:, done:], shared, output_hidden_states)
        if not done:
            return blocks
        states = [torch.cat((a[:, :done], b), 1) for a, b in zip(first.blocks.hidden_states, blocks.hidden_states)]
        return blocks._replace(hidden=torch.cat((first.blocks.hidden[:, :done], blocks.hidden), 1), hidden_states=states)

    def _checked(self, batch: dict[str, Any], cache: KVCache | None) -> dict[str, Any]:
        """The batch with int64 indices.

        Raises:
            ValueError: an input is missing, or the images come too late.
        """
        missing = [name for name in (*self.FEATURES, "position_ids") if batch.get(name) is None]
        if missing:
            raise ValueError(f"HeMolmo: images need {', '.join(missing)} as well (the preprocessor gives them)")
        if cache is not None and cache.length:
            raise ValueError("HeMolmo: images come with the prompt, in the first call of a cache")
        if self.vision_backbone is None:
            raise ValueError("images were given to a text-only model (vision_backbone is null)")
        return batch | {name: batch[name].long() for name in ("low_res_tokens_idx", "high_res_tokens_idx", "high_res_pos_ids")}


def token_positions(where: torch.Tensor, n: int) -> torch.Tensor:
    """Positions of the true entries of each row: bool [B, S] -> int64 [B, n], in order, padded with -1."""
    order = (~where).int().argsort(dim=1, stable=True)[:, :n]
    order = torch.nn.functional.pad(order, (0, n - order.shape[1]))
    return order.masked_fill(torch.arange(n, device=where.device) >= where.sum(1, keepdim=True), -1)


def _cut(
    batch: dict[str, Any], valid: torch.Tensor, response: torch.Tensor | None, first: int, last: int
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
    """What the attention mask needs, for the queries first..last of all tokens up to `last`."""
    given, segments = batch["attention_mask"], batch["subsegment_ids"]
    view = {
        "input_ids": batch["input_ids"][:, first:last],
        "subsegment_ids": None if segments is None else segments[:, first:last],
        "attention_mask": given[:, :, first:last, :last] if given is not None and given.dim() == 4 else valid[:, :last],
    }
    return view, valid[:, :last], None if response is None else response[:, first:last]
