"""The media of prompts: looked at once, those of all prompts of a step together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from molmo_core.generation.engine.blocks import compile_vision
from molmo_core.generation.engine.features import FeatureCache
from molmo_core.generation.engine.prompt import Prompt
from molmo_core.generation.engine.slices import Slices
from molmo_core.generation.engine.stopwatch import Stopwatch
from molmo_core.inputs import Inputs, as_batch

Features = list[tuple[torch.Tensor, torch.Tensor]]
"""What a vision backbone gives for one prompt."""


class _Media(NamedTuple):
    """Of one prompt, on the CPU."""

    images: np.ndarray
    """[crops, ...]."""
    masks: np.ndarray | None
    """[crops, patches]."""
    indices: list[np.ndarray]
    """Each int64 [n, k], into the patches of all its crops."""
    patches: int
    """Of all its crops."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """Media of one kind can be looked at together."""
        widths = tuple(idx.shape[1] for idx in self.indices)
        return self.images.shape[1:], self.images.dtype, self.masks is None, widths


class MediaEncoder:
    """The vision backbone of a model, and the features that it gave."""

    def __init__(self, model: Any, cache: FeatureCache, to_device: Callable[[np.ndarray], torch.Tensor]):
        self.model, self.cache, self._to_device = model, cache, to_device
        self._device = next(model.parameters()).device
        if self._device.type == "cuda":
            compile_vision(model)
        self._crop_tokens = 1.0
        """Tokens of a prompt whose reading is as much work as looking at a crop."""
        if model.vision_backbone is not None:
            parts = model.vision_backbone.image_vit, model.transformer.blocks
            encoder, blocks = (sum(p.numel() for p in part.parameters()) for part in parts)
            self._crop_tokens = model.config.vision_backbone.vit.patches_per_crop * encoder / blocks

    def slices(self, prompts: Iterable[Prompt], slice_tokens: int | None) -> Slices[dict[bytes, Features]]:
        """Features of all media of these prompts, by their digest; with pauses, see `EngineLimits`.

        Raises:
            ValueError: indices that do not fit images or tokens.
        """
        found: dict[bytes, Features] = {}
        new: dict[tuple[Any, ...], dict[bytes, _Media]] = {}
        watch, looked = Stopwatch(self._device), []
        for prompt in prompts:
            if not prompt.digest or prompt.digest in found:
                continue
            known = self.cache.get(prompt.digest)
            if known is not None:
                found[prompt.digest] = known
                continue
            media = self._media(prompt)
            new.setdefault(media.kind, {})[prompt.digest] = media
            looked.append(prompt)
            if slice_tokens is not None:
                yield  # what the host does for a prompt takes milliseconds, too
        for group in new.values():
            parts = yield from self._look(list(group.values()), slice_tokens)
            for digest, features in zip(group, parts):
                self.cache.put(digest, features)
                found[digest] = features
        watch.stop()
        for prompt in looked:  # each waited for all
            prompt.looked = watch
        return found

    def _media(self, prompt: Prompt) -> _Media:
        inputs = Inputs.of(0, **as_batch(prompt.example, torch.device("cpu")))
        images = prompt.example["images"]
        masks = prompt.example.get("image_masks")
        if self.model.vision_backbone is None:
            raise ValueError("images were given to a text-only model (vision_backbone is null)")
        patches = len(images) * self.model.config.vision_backbone.vit.patches_per_crop
        targets = self.model.checked_targets(inputs, len(images), patches)
        return _Media(images, masks, [target.pooled_idx[0].long().numpy() for target in targets], patches)

    def _look(self, media: Sequence[_Media], slice_tokens: int | None) -> Slices[list[Features]]:
        """Features of each; the encoder sees the crops of all together, as many at a time as a slice has room for."""
        before = np.cumsum([0, *(m.patches for m in media[:-1])])
        images = torch.cat([self._to_device(m.images) for m in media])
        given = [m.masks for m in media if m.masks is not None]
        masks = self._to_device(np.concatenate(given)) if given else None
        crops = len(images) if slice_tokens is None else max(1, int(slice_tokens / self._crop_tokens))
        patches = []
        for first in range(0, len(images), crops):
            some = slice(first, first + crops)
            patches.append(self.model.vision_backbone.patch_features(images[None, some], None if masks is None else masks[None, some]))
            if slice_tokens is not None:
                yield
        indices = [
            self._to_device(np.concatenate([np.where(m.indices[i] < 0, -1, m.indices[i] + first) for m, first in zip(media, before)]))
            for i in range(len(media[0].indices))
        ]
        results = self.model.pooled(torch.cat(patches, 1), *(idx[None] for idx in indices))
        parts: list[Features] = [[] for _ in media]
        for i, (features, present) in enumerate(results):
            sizes = [len(m.indices[min(i, len(indices) - 1)]) for m in media]  # what comes besides belongs to the last index
            for part, of_one, there in zip(parts, features.split(sizes, 1), present.split(sizes, 1)):
                part.append((of_one.clone(), there.clone()))  # a view would keep the features of all
        return parts
