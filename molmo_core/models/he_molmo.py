"""HeMolmo: the question chooses which high-resolution image tokens the language model sees.

A first pass of the language model over the question and a low-resolution image scores the high-resolution tokens; the best K enter
the second pass, at rotary positions that tell where in the image they are. See `molmo_core.nn.token_selection`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from molmo_core.inputs import Inputs
from molmo_core.model_configs.he_molmo import HeMolmoConfig
from molmo_core.models.image_features import FeatureTarget, add_features, share_low_embedding, token_positions
from molmo_core.models.molmo import Embedded, Look, Molmo
from molmo_core.nn.attention import Attention, Whole
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import Pass, TransformerOutput
from molmo_core.nn.sequence_layout import in_image
from molmo_core.nn.token_selection import Selection, TokenScoring, select_tokens


class _FirstPass(NamedTuple):
    """What the first pass over [B, S_low] leaves behind."""

    blocks: TransformerOutput
    ends: torch.Tensor
    """int64 [B], where the low-resolution image ends; -1 in rows without one."""
    done: int
    """Tokens, the same number in all rows, whose keys and values in the cache are final."""


class HeMolmo(TokenScoring, Molmo):
    """Molmo with hierarchical token selection.

    `forward` takes what Molmo's does and, instead of `pooled_patches_idx`: `low_res_tokens_idx` int64 [B, n_low, k] and
    `high_res_tokens_idx` int64 [B, N, k], patches of the low-resolution tokens and of the candidates; `high_res_pos_ids` int64 [B, N],
    their places; `high_res_features_weights` float [B, K], 1 for each token to keep; `low_to_high` float [B, n_low·f·f, N]. The
    preprocessor gives all of them. `output.internal` holds `selected` int64 [B, K], `high_res_importance` [B, N] and
    `low_res_importance` [B, n_low, f·f]; in training `output.loss` includes the selection loss.

    Without gradients the second pass continues from the keys and values of the first: the question and the low-resolution image never
    see what comes after them, so they are computed once. The published code computes them twice; the numbers are the same.
    """

    config: HeMolmoConfig
    FEATURES: ClassVar[tuple[str, ...]] = (
        "low_res_tokens_idx", "high_res_tokens_idx", "high_res_pos_ids", "high_res_features_weights", "low_to_high",
    )  # fmt: skip
    CONNECTOR: ClassVar[tuple[str, ...]] = (*Molmo.CONNECTOR, *(f"{name}." for name in TokenScoring.SCORER_LAYERS))

    FILLS_CACHE: ClassVar[bool] = True
    SHARES_CONTEXT: ClassVar[bool] = False

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

    def inputs(self, given: Mapping[str, Any], past: int = 0) -> Inputs:
        inputs = super().inputs(given, past)
        if inputs.images is None:
            return inputs
        missing = [name for name in (*self.FEATURES, "position_ids") if given.get(name) is None]
        if missing:
            raise ValueError(f"HeMolmo: images need {', '.join(missing)} as well (the preprocessor gives them)")
        if past:
            raise ValueError("HeMolmo: images come with the prompt, in the first call of a cache")
        numbers = ("low_res_tokens_idx", "high_res_tokens_idx", "high_res_pos_ids")
        return inputs._replace(features={**inputs.features, **{name: inputs.features[name].long() for name in numbers}})

    def feature_targets(self, inputs: Inputs, crops: int) -> list[FeatureTarget]:
        """Of the low resolution, and the candidates, whose tokens are chosen later."""
        low, high = (inputs.features[name].long() for name in ("low_res_tokens_idx", "high_res_tokens_idx"))
        return [FeatureTarget(low, token_id=self.config.image_tokens.low), FeatureTarget(high)]

    def embed(self, inputs: Inputs, cache: KVCache | None = None, look: Look | None = None) -> Embedded:
        """Both passes' embeddings: the first pass runs here. What it has done for good stays in the cache (see `may_reuse_first_pass`)."""
        cache = cache if self.may_reuse_first_pass(inputs) else None
        if inputs.images is None:
            embedded = super().embed(inputs)
            return embedded._replace(tokens=self._stand_in(embedded.tokens, cache is not None)) if self.stands_in(inputs) else embedded
        if self.vision_backbone is None:
            raise ValueError("images were given to a text-only model (vision_backbone is null)")
        config, ids, low_id, given = self.config, inputs.input_ids, self.config.image_tokens.low, inputs.features
        targets = self.feature_targets(inputs, inputs.images.shape[1])
        (low, low_present), (high, high_present) = (look or self.vision_backbone)(
            inputs.images, inputs.image_masks, *(target.pooled_idx for target in targets)
        )
        high = high * high_present[..., None]
        x = add_features(self.embed_tokens(inputs.token_ids), ids, low, low_present, targets[0])
        tokens = Pass(x, inputs.positions, inputs.real, inputs.response)
        first = self._first_pass(tokens, inputs, cache)
        length = first.blocks.hidden.shape[1]
        scores, low_scores = self.score_candidates(
            first.blocks.hidden_states[: config.low_res_layers],
            token_positions(ids[:, :length] == low_id, low.shape[1]),
            (first.ends - 1).clamp(min=0),
            high,
            high_present,
            given["low_to_high"],
        )
        scaled = config.token_scorer.selection_model != "random"
        selection = select_tokens(config.token_selector, scores, high_present, given["high_res_features_weights"], self.training, scaled)
        metrics = dict(selection.metrics)
        if selection.loss is not None:
            metrics["selection_loss"] = selection.loss.detach()
        internal = {"selected": selection.indices, "high_res_importance": scores.detach()}
        if low_scores is not None:
            internal["low_res_importance"] = low_scores.detach()
        tokens = self._placed(tokens, inputs, high, selection)
        if not first.done:
            return Embedded(tokens, None, selection.loss, metrics, internal)
        done = TransformerOutput(first.blocks.hidden[:, : first.done], [h[:, : first.done] for h in first.blocks.hidden_states], [])
        return Embedded(tokens.part(first.done, x.shape[1]), done, selection.loss, metrics, internal)

    def may_reuse_first_pass(self, inputs: Inputs) -> bool:
        """Whether the tokens of the first pass see the same in the second: no gradient, no dropout, nothing ahead, the question too."""
        return (
            not torch.is_grad_enabled()
            and not self.training
            and not self.config.token_scorer.unconditioned
            and self.config.bi_directional_attn in (None, "within_image")
            and inputs.segments is None
            and inputs.mask is None
        )

    def _first_pass(self, tokens: Pass, inputs: Inputs, cache: KVCache | None) -> _FirstPass:
        """The language model over the question and the low-resolution image: tokens with its features.

        With a cache all blocks run, and the keys and values that the second pass can use stay there.
        """
        scorer = self.config.token_scorer
        end = inputs.input_ids == self.config.image_tokens.end
        ends = torch.where(end.any(1), end.int().argmax(1), -1)
        length = int(ends.max()) + 1
        tokens, view = tokens.part(0, length), inputs.first(length)
        if scorer.unconditioned and view.valid is not None:
            image = in_image(view.input_ids, self.config.image_tokens)
            view = view._replace(valid=view.valid & image)
            tokens = tokens._replace(x=tokens.x * image[..., None], valid=view.valid)
        tokens = tokens if scorer.bp_low_res_embed else tokens._replace(x=tokens.x.detach())
        blocks = self._first_blocks(tokens, self.attention(view, cache=cache), cache is not None)
        if cache is None:
            return _FirstPass(blocks, ends, 0)
        done = int(torch.where(ends >= 0, ends + 1, length).min())
        cache.truncate(done)
        return _FirstPass(blocks, ends, done)

    def _first_blocks(self, tokens: Pass, attention: Attention, all_layers: bool) -> TransformerOutput:
        """The blocks of the first pass: all of them, without a gradient, or those that the scorer reads."""
        if all_layers:
            return self.run(tokens, attention, output_hidden_states=True)
        scorer, layers = self.config.token_scorer, self.config.low_res_layers
        start, stop = scorer.bp_low_res_start, min(max(scorer.bp_low_res_end, scorer.bp_low_res_start), layers)
        hidden_states: list[torch.Tensor] = []
        blocks = TransformerOutput(self.transformer.first_hidden(tokens.x), [], [])
        for part, grad in ((range(start), False), (range(start, stop), True), (range(stop, layers), False)):
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                blocks = self.transformer.run_blocks(tokens._replace(x=blocks.hidden), attention, True, part)
            hidden_states += blocks.hidden_states
        return blocks._replace(hidden_states=hidden_states)

    def _stand_in(self, tokens: Pass, all_layers: bool) -> Pass:
        """For a batch without images: as in Molmo, every rank does what ranks with images do: a first pass, and scoring."""
        token = tokens.part(0, 1)
        x = token.x if self.config.token_scorer.bp_low_res_embed else token.x.detach()
        positions = torch.zeros_like(token.positions)
        token = Pass(x, positions, response=torch.zeros_like(positions, dtype=torch.bool) if self.training else None)
        first = self._first_blocks(token, Whole(), all_layers)
        scorer = [p for name, p in self.named_parameters() if name.startswith(self.SCORER_LAYERS)]
        return tokens._replace(x=tokens.x + 0 * torch.stack([t.sum() for t in (*first.hidden_states, *scorer)]).sum())

    def _placed(self, tokens: Pass, inputs: Inputs, high: torch.Tensor, selection: Selection) -> Pass:
        """The tokens with the chosen candidates: their features, their positions and their attention-value factors."""
        ids, patch, given = inputs.input_ids, self.config.image_tokens.patch, inputs.features
        found, wanted = (ids == patch).sum(1), (given["high_res_features_weights"] > 0).sum(1)
        if not torch.equal(found, wanted):
            row = int((found != wanted).nonzero()[0, 0])
            raise ValueError(
                f"row {row}: {int(found[row])} image tokens (id {patch}) in input_ids, "
                f"but {int(wanted[row])} weights in high_res_features_weights"
            )
        slots = token_positions(ids == patch, selection.indices.shape[1])
        index = selection.indices.clamp(max=high.shape[1] - 1)
        chosen = high.gather(1, index[..., None].expand(-1, -1, high.shape[-1]))
        x = add_features(tokens.x, ids, chosen, selection.valid, FeatureTarget(selection.indices, positions=slots))
        moved = torch.where(selection.valid, given["high_res_pos_ids"].gather(1, index), 0)
        tokens = tokens._replace(x=x, positions=tokens.positions.scatter_add(1, slots.clamp(min=0), moved))
        if selection.importance is None:
            return tokens
        ones = torch.ones(ids.shape, dtype=torch.float32, device=ids.device)
        factors = torch.where(selection.valid, selection.importance - 1, 0.0)
        return tokens._replace(scale=ones.scatter_add(1, slots.clamp(min=0), factors))
