"""MolmoPoint: Molmo2 that points by choosing image tokens, patches and cells instead of writing coordinates."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import torch

from molmo_core.generation.point_state import PointState
from molmo_core.inputs import Inputs, Targets
from molmo_core.model_configs.molmo_point import MolmoPointConfig
from molmo_core.models.image_features import FeatureTarget, share_low_embedding
from molmo_core.models.molmo import Embedded, Look, Molmo
from molmo_core.nn.connector import MolmoVisionBackbone
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.llm import Pass, TransformerOutput
from molmo_core.nn.point_loss import NAMES, PointTargets, point_logits, point_losses
from molmo_core.nn.pointing import PointEmbedding, PointPredictor, PointSources
from molmo_core.outputs import OLMoOutput
from molmo_core.preprocessing.point_tokens import LIST_START
from molmo_core.tokens import NO_MORE_POINTS, PACK_STRIDE


class _Points(NamedTuple):
    """What the heads need to know of a call."""

    inputs: Inputs
    sources: PointSources | None = None
    targets: PointTargets | None = None
    cache: KVCache | None = None


class MolmoPoint(Molmo):
    """Molmo2's network with three heads that choose points (`molmo_core.nn.pointing`).

    `forward` takes what Molmo2's does, and `point_target_ids` int64 [B, n, 3] for the points in `input_ids`: image token (counted over
    all of the row; `NO_MORE_POINTS` ends a list), patch of the token, cell of the patch; -1 = absent. With labels their losses are part of
    `loss`. With a cache the points of further tokens are chosen, and what was chosen stays in the cache's `state`.
    """

    config: MolmoPointConfig
    vision_backbone: MolmoVisionBackbone
    EXTENDS: ClassVar[str] = "molmo2"
    FEATURES: ClassVar[tuple[str, ...]] = ("point_target_ids",)
    SHARES_CONTEXT: ClassVar[bool] = False

    def __init__(self, config: MolmoPointConfig):
        super().__init__(config)
        self.point_predictor, self.point_embedding = _point_modules(config)
        if self.device.type != "meta":
            self.point_predictor.reset_parameters()
            self.point_embedding.reset_parameters()

    # -- the steps of forward ------------------------------------------------------------------------------------------

    def embed(self, inputs: Inputs, cache: KVCache | None = None, look: Look | None = None) -> Embedded:
        x = self.embed_tokens(inputs.token_ids)
        if inputs.past:
            state = None if cache is None else cache.state
            if state is not None and x.shape[1] == 1:
                x = x + state.feed(inputs.input_ids[:, 0])[:, None].to(x.dtype)
            return Embedded(Pass(x, inputs.positions, inputs.real, inputs.response), kept=_Points(inputs, cache=cache))
        sources = self.point_sources(inputs, look)
        rows, tokens = sources.present.any(-1).nonzero(as_tuple=True)
        flat = rows * x.shape[1] + sources.positions[rows, tokens]
        x = x.flatten(0, 1).index_add(0, flat, sources.features[rows, tokens].to(x.dtype)).view_as(x)
        if inputs.images is None and self.stands_in(inputs):
            x = x + self.vision_backbone.blank_features(x.shape[0]).to(x.dtype) * 0
        targets = self._targets(inputs)
        if targets is not None:
            x = self._with_points(x, sources, targets)
        return Embedded(Pass(x, inputs.positions, inputs.real, inputs.response), kept=_Points(inputs, sources, targets, cache))

    def head(
        self,
        embedded: Embedded,
        blocks: TransformerOutput,
        targets: Targets | None = None,
        select: torch.Tensor | None = None,
        return_logits: bool = True,
    ) -> OLMoOutput:
        output = super().head(embedded, blocks, targets, select, return_logits)
        points: _Points = embedded.kept
        if targets is not None:
            return self._with_point_losses(output, blocks.hidden, points, targets)
        if points.targets is not None:
            logits = self._point_logits(blocks.hidden, points)
            internal = {"patch_logits": logits.tokens, "subpatch_logits": logits.patches}
            output = output._replace(internal=internal if logits.cells is None else {**internal, "location_logits": logits.cells})
        if points.cache is None or not return_logits:
            return output
        last = points.inputs.last_positions()
        batch = torch.arange(len(last), device=last.device)
        hidden = blocks.hidden[batch, last]
        if points.sources is not None:
            x = self.point_predictor.normed(blocks.hidden[batch[:, None], points.sources.positions])
            points.cache.state = PointState(self.point_predictor, self.point_embedding, self.config.point_tokens, points.sources, x)
        if points.cache.state is not None:
            at = (batch, torch.zeros_like(last) if output.logits.shape[1] == 1 else last)
            output.logits[at] = points.cache.state.observe(hidden, output.logits[at])
        return output

    @property
    def further_losses(self) -> tuple[str, ...]:
        return NAMES if self.config.cells else NAMES[:2]

    # -- parts ---------------------------------------------------------------------------------------------------------

    def own_parts(self) -> dict[str, torch.Tensor]:
        with torch.device("cpu"):
            predictor, embedding = _point_modules(self.config)
        predictor.reset_parameters()
        embedding.reset_parameters()
        tensors = {f"point_predictor.{name}": tensor for name, tensor in predictor.state_dict().items()}
        tensors |= {f"point_embedding.{name}": tensor for name, tensor in embedding.state_dict().items()}
        llm = self.config.llm
        return tensors | {"transformer.ff_out.new_weight": torch.zeros(llm.additional_vocab_size, llm.d_model)}

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.transformer.wte(share_low_embedding(ids, self.config.image_tokens) if self.config.shared_low_high_embedding else ids)

    def look(
        self, images: torch.Tensor, image_masks: torch.Tensor | None, *pooled_idx: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Features of the image tokens [B, M, d] and which exist, bool [B, M]; the features [B, M, k, P] of their patches, which exist."""
        return self.pooled(self.vision_backbone.patch_features(images, image_masks), *pooled_idx)

    def pooled(self, features: torch.Tensor, *pooled_idx: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        idx = pooled_idx[0]
        present = idx >= 0
        rows = torch.arange(len(idx), device=idx.device)[:, None, None]
        patches = features[rows, idx.clamp(min=0)] * present[..., None].to(features.dtype)
        return [*self.vision_backbone.pool(features, idx), (patches, present)]

    def feature_targets(self, inputs: Inputs, crops: int) -> list[FeatureTarget]:
        """Of the tokens of both resolutions, in their order."""
        return [FeatureTarget(target.pooled_idx) for target in super().feature_targets(inputs, crops)]

    def point_sources(self, inputs: Inputs, look: Look | None = None) -> PointSources:
        """The image tokens of a call without a cache, and what they are made of.

        Raises:
            ValueError: a row has another number of image tokens than of features.
        """
        ids, tokens = inputs.input_ids, self.config.image_tokens
        is_token = (ids == tokens.patch) | (ids == tokens.low)
        found = is_token.sum(1)
        if inputs.images is None:
            features, patches, present = self._nothing(len(ids))
        else:
            idx = self.feature_targets(inputs, inputs.images.shape[1])[0].pooled_idx
            (features, _), (patches, present) = (look or self.look)(inputs.images, inputs.image_masks, idx)
        given = present.any(-1)
        if not torch.equal(found, given.sum(1)):
            row = int((found != given.sum(1)).nonzero()[0, 0])
            raise ValueError(
                f"row {row}: {int(found[row])} image tokens in input_ids, but {int(given[row].sum())} image features; "
                "images, pooled_patches_idx and input_ids must come from the same preprocessing (was the sequence cut inside an image?)"
            )
        rows, places = is_token.nonzero(as_tuple=True)
        numbers = (is_token.cumsum(1) - 1)[rows, places]
        positions = torch.zeros_like(given, dtype=torch.int64)
        positions[rows, numbers] = places
        batch = torch.arange(len(ids), device=ids.device)[:, None]
        selectable = given & (ids[batch, positions] == tokens.patch)
        examples = self._examples(inputs)[batch, positions].masked_fill(~given, -1)
        return PointSources(features, patches, present, positions, image_token_numbers(selectable, examples), selectable, examples)

    def _nothing(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sources of rows without media: one image token that is not there."""
        weight = self.point_predictor.subpatch_k.weight
        features = weight.new_zeros(rows, 1, self.config.llm.d_model)
        patches = weight.new_zeros(rows, 1, 1, weight.shape[1])
        return features, patches, torch.zeros(rows, 1, 1, dtype=torch.bool, device=weight.device)

    def _examples(self, inputs: Inputs) -> torch.Tensor:
        """int64 [B, S]: the number of each token's example in its pack."""
        return torch.zeros_like(inputs.input_ids) if inputs.segments is None else inputs.segments.clamp(min=0) // PACK_STRIDE

    def _targets(self, inputs: Inputs) -> PointTargets | None:
        labels = inputs.features.get("point_target_ids")
        if labels is None and inputs.labels is None:
            return None
        if labels is None:
            labels = inputs.input_ids.new_full((len(inputs.input_ids), 0, 3), -1)
        return PointTargets.of(labels, inputs.input_ids, self.config.point_tokens)

    def _with_points(self, x: torch.Tensor, sources: PointSources, targets: PointTargets) -> torch.Tensor:
        """Adds what the tokens of points stand for to their embeddings [B, S, d]."""
        labels, length, embedding = targets.labels, x.shape[1], self.point_embedding
        flat = x.flatten(0, 1)
        rows, numbers = ((labels[..., 0] >= 0) & (labels[..., 0] < NO_MORE_POINTS)).nonzero(as_tuple=True)
        token = labels[rows, numbers, 0]
        chosen = embedding.of_token(sources.features[rows, token], sources.patches[rows, token])
        flat = flat.index_add(0, rows * length + targets.at[rows, numbers], chosen.to(x.dtype))
        rows, numbers, places = targets.patches
        token, slot = labels[rows, numbers, 0], labels[rows, numbers, 1]
        patch = embedding.of_patch(sources.patches[rows, token, slot], slot)
        if patch is not None:
            flat = flat.index_add(0, rows * length + places, patch.to(x.dtype))
        rows, numbers, places = targets.cells
        cell = embedding.of_cell(labels[rows, numbers, 2])
        if cell is not None:
            flat = flat.index_add(0, rows * length + places, cell.to(x.dtype))
        return flat.view_as(x)

    def _point_logits(self, hidden: torch.Tensor, points: _Points) -> Any:
        assert points.sources is not None
        assert points.targets is not None
        groups = (points.inputs.input_ids == self._list_start).cumsum(1)
        return point_logits(self.point_predictor, hidden, points.sources, points.targets, groups, self._examples(points.inputs))

    def _with_point_losses(self, output: OLMoOutput, hidden: torch.Tensor, points: _Points, targets: Targets) -> OLMoOutput:
        assert points.targets is not None
        assert output.metrics is not None
        assert output.loss is not None
        # Every parameter has a gradient in every step, also without a point: under FSDP ranks reduce them together.
        unused = [p.sum() * 0 for part in (self.point_predictor, self.point_embedding) for p in part.parameters()]
        loss, metrics = output.loss + torch.stack(unused).sum(), dict(output.metrics)
        none = loss.detach() * 0
        losses = dict.fromkeys(self.further_losses, (none, none, none))
        if points.targets.labels.shape[1]:
            logits = self._point_logits(hidden, points)
            losses = point_losses(logits, points.targets, targets.loss_masks if self.config.weigh_point_losses else None)
            divisor = metrics["loss_weight"].clamp(min=1e-6) if targets.divisor is None else targets.divisor
            loss = loss + sum(total for total, _, _ in losses.values()) / divisor
        for name, (total, right, count) in losses.items():
            metrics[f"{name}_loss"] = total.detach() / count.clamp(min=1e-6)
            metrics[f"{name}_acc"] = right / count.clamp(min=1e-6)
            metrics[f"{name}_count"] = count
        return output._replace(loss=loss, metrics=metrics)

    @functools.cached_property
    def _list_start(self) -> int:
        """Id of the token that ends the start of a list of points, encoded as it is in a text."""
        return self.tokenizer.encode(f"<points {LIST_START}")[-1]


def _point_modules(config: MolmoPointConfig) -> tuple[PointPredictor, PointEmbedding]:
    llm, vision = config.llm, config.vision_backbone
    patch_width = vision.vit.image_emb_dim * len(vision.vit_layers)
    predictor = PointPredictor(config, llm.d_model, patch_width, llm.layer_norm_eps, llm.rope_theta)
    return predictor, PointEmbedding(config, llm.d_model, patch_width, config.most_patches)


def image_token_numbers(selectable: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
    """int64 [B, M]: how many selectable tokens of the same example come before each image token (published: `image_pos_ids`).

    Args:
        selectable: bool [B, M].
        examples: int64 [B, M], not falling; -1 for padding at the end.
    """
    here = selectable.long()
    total = here.cumsum(1)
    begins = torch.ones_like(selectable)
    begins[:, 1:] = examples[:, 1:] != examples[:, :-1]
    before = torch.where(begins, total - here, 0).cummax(1).values
    return (total - before - 1).clamp(min=0).masked_fill(examples < 0, 0)
