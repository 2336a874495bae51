"""Raw example → model inputs: the Molmo preprocessor, and the parts that the other models' preprocessors share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from molmo_core.preprocessing.configs import DataFormatter, ImagePreprocessorConfig, MolmoPreprocessorConfig
from molmo_core.preprocessing.data_formatter import Formatter
from molmo_core.preprocessing.images import (
    ImageFeatures,
    ImageSettings,
    image_token_counts,
    image_tokens,
    join_images,
    preprocess_image,
)
from molmo_core.preprocessing.media import load_image
from molmo_core.preprocessing.messages import Annotation, MediaTokens, assemble_sequence
from molmo_core.preprocessing.point_places import PointPlaces
from molmo_core.preprocessing.point_tokens import PointStyle, PointWriter
from molmo_core.preprocessing.tiling import VisionEncoder
from molmo_core.preprocessing.tokenizer import Tokenizer

IMAGE_KEYS = ("image", "images")
NO_VIDEO = "the example has a video, but the model takes text and images only; for videos use Molmo2 or VideoOlmo"


@dataclasses.dataclass
class TextPreprocessor:
    """What every preprocessor does with the text of an example. Subclasses turn media into `MediaTokens` and arrays.

    Attributes:
        tokenizer: the tokenizer of the model.
        formatter: makes messages of a record.
        limits: `loss_token_weighting` and `max_text_tokens` are read from it.
        for_inference: no answer, no labels.
        is_training: vary prompts and resolution (never at inference).
        include_image: put the decoded media in the metadata, for pictures of predictions.
        max_seq_len: longest sequence; None = no limit.
        point_style: how points are written as tokens (MolmoPoint).
    """

    tokenizer: Tokenizer
    formatter: Formatter
    limits: ImagePreprocessorConfig
    for_inference: bool = False
    is_training: bool = True
    include_image: bool = False
    max_seq_len: int | None = None
    point_style: PointStyle = dataclasses.field(default_factory=PointStyle)

    def __post_init__(self) -> None:
        self.is_training = self.is_training and not self.for_inference

    def annotations(
        self,
        example: dict[str, Any],
        rng: np.random.RandomState,
        image_sizes: Sequence[tuple[int, int]] = (),
        places: PointPlaces | None = None,
    ) -> list[Annotation]:
        """The conversations of an example; `image_sizes` are (width, height), `places` what can be pointed at (MolmoPoint)."""
        points = None if places is None else PointWriter(self.point_style, places, rng)
        return self.formatter(
            example, rng, for_inference=self.for_inference, is_training=self.is_training, image_sizes=image_sizes, points=points
        )

    def assemble(
        self, example: dict[str, Any], annotations: Sequence[Annotation], media: Sequence[MediaTokens], arrays: dict[str, np.ndarray | None]
    ) -> dict[str, Any]:
        """The preprocessed example: token arrays, the media's arrays (None = absent) and `metadata`."""
        sequence = assemble_sequence(
            self.tokenizer,
            annotations,
            media,
            for_inference=self.for_inference,
            weighting=self.limits.loss_token_weighting,
            max_seq_len=self.max_seq_len,
            max_text_tokens=self.limits.max_text_tokens,
        )
        metadata = dict(example.get("metadata") or {})
        truncation = sequence.pop("truncation", None)
        if truncation:
            metadata["truncation"] = truncation
        return {**sequence, **{k: v for k, v in arrays.items() if v is not None}, "metadata": metadata}


@dataclasses.dataclass
class MolmoPreprocessor(TextPreprocessor):
    """Text with no, one or several images.

    Attributes:
        settings: how an image is cut and pooled; None = the model takes text only.
        config: limits and probabilities for several images and for high resolution.
    """

    settings: ImageSettings | None = None
    config: MolmoPreprocessorConfig = dataclasses.field(default_factory=MolmoPreprocessorConfig)

    def __call__(self, example: dict[str, Any], rng: np.random.RandomState | None = None) -> dict[str, Any]:
        """Preprocesses one example.

        Args:
            example: `image` or `images` (path, bytes, Pillow image, array, or the `ImageFeatures` that `preprocess_image` made of it with
                `image_settings`), if any, and a record (see `data_formatter`).
            rng: randomness of prompts, trees and resolution; None = always the same draws.

        Returns:
            numpy arrays `input_ids`, `position_ids` [S]; in training `labels`, `loss_masks` [S]; for message trees `subsegment_ids` [S];
            with images `images` uint8 [crops, patches, p·p·3], `pooled_patches_idx` [n, k] and, for encoders that pad, `image_masks`
            [crops, patches]; `metadata`: the example's own, plus `image_sizes` [(width, height)] and, where they apply, `truncation`
            and `image_arrays`.

        Raises:
            ValueError: a record, image or length that does not fit (`MediaError` for images).
        """
        rng = np.random.RandomState(0) if rng is None else rng
        if example.get("video") is not None:
            raise ValueError(NO_VIDEO)
        images = [source if isinstance(source, ImageFeatures) else load_image(source) for source in example_images(example)]
        sizes = [image.size if isinstance(image, ImageFeatures) else (image.shape[1], image.shape[0]) for image in images]
        settings = self._settings_of(len(images), rng)
        annotations = self.annotations(example, rng, sizes, self.image_places(sizes, settings))
        media, arrays = self.image_inputs(images, settings)
        result = self.assemble(example, annotations, media, arrays)
        if images:
            result["metadata"]["image_sizes"] = sizes
        if self.include_image:
            result["metadata"]["image_arrays"] = images
        return result

    def image_places(self, sizes: Sequence[tuple[int, int]], settings: ImageSettings | None) -> PointPlaces | None:
        """What can be pointed at in images of (width, height), for models whose points are no text."""
        return None

    def image_inputs(
        self, images: Sequence[np.ndarray | ImageFeatures], settings: ImageSettings | None
    ) -> tuple[list[MediaTokens], dict[str, np.ndarray | None]]:
        """Tokens of each image ("Image k" before each of several) and the arrays of all of them; `settings` as for so many images."""
        if settings is None:
            return [], {}
        features = [image_features(image, settings) for image in images]
        media = []
        for number, feature in enumerate(features, 1):
            ids = image_tokens(feature.grids, self.tokenizer, settings)
            if len(features) > 1:
                ids = np.concatenate([self.tokenizer.encode(f"Image {number}"), ids])
            media.append(MediaTokens(ids))
        return media, image_arrays(join_images(features))

    def measure(
        self, example: dict[str, Any], image_sizes: Sequence[tuple[int, int]], rng: np.random.RandomState | None = None
    ) -> tuple[int, int]:
        """Tokens and crops that the call with the same example and `rng` gives, from the sizes (height, width) of its images alone.

        Raises:
            ValueError: as the call.
        """
        rng = np.random.RandomState(0) if rng is None else rng
        sizes = [(width, height) for height, width in image_sizes]
        settings = self._settings_of(len(sizes), rng)
        annotations = self.annotations(example, rng, sizes, self.image_places(sizes, settings))
        counts = self.image_counts(image_sizes, settings)
        media = [MediaTokens(np.full(tokens, self.tokenizer.image_patch_token_id)) for tokens, _ in counts]
        sequence = self.assemble(example, annotations, media, {})
        return len(sequence["input_ids"]), sum(crops for _, crops in counts)

    def measure_video(
        self, example: dict[str, Any], timestamps: np.ndarray, fps: float, rng: np.random.RandomState | None = None
    ) -> tuple[int, int]:
        """`measure` for an example with a video; raises ValueError: see `VideoPreprocessor` for the models that take one."""
        raise ValueError(NO_VIDEO)

    def image_counts(self, sizes: Sequence[tuple[int, int]], settings: ImageSettings | None) -> list[tuple[int, int]]:
        """Tokens (label included) and crops of each image, from its height and width."""
        if settings is None:
            return []
        counts = [image_token_counts(height, width, settings) for height, width in sizes]
        if len(sizes) == 1:
            return counts
        return [(len(self.tokenizer.encode(f"Image {k}")) + tokens, crops) for k, (tokens, crops) in enumerate(counts, 1)]

    def image_settings(self, images: int) -> ImageSettings:
        """How each of so many images of an example (at least one) is cut at inference.

        Raises:
            ValueError: the model does not take so many.
        """
        settings = self._settings_of(images, np.random.RandomState(0))
        assert settings is not None
        return settings

    def _settings_of(self, images: int, rng: np.random.RandomState) -> ImageSettings | None:
        """How each of so many images is cut; None: there are none."""
        if not images:
            return None
        if self.settings is None:
            raise ValueError("the example has an image, but the model has no vision_backbone")
        if self.config.max_images is not None and images > self.config.max_images:
            raise ValueError(f"{images} images, but mm_preprocessor.max_images={self.config.max_images}")
        return dataclasses.replace(self.settings, max_crops=self._max_crops(images, rng))

    def _max_crops(self, images: int, rng: np.random.RandomState) -> int:
        config = self.config
        if images > 1 and config.max_multi_image_crops is not None:
            return config.max_multi_image_crops
        if self.is_training and config.high_res_max_crops is not None and config.p_high_res > 0 and rng.random_sample() < config.p_high_res:
            return config.high_res_max_crops
        return config.max_crops


def example_images(example: dict[str, Any]) -> list[Any]:
    """Image sources of an example: `image` (one, or a list) or `images`.

    Raises:
        ValueError: both keys are given.
    """
    given = [k for k in IMAGE_KEYS if example.get(k) is not None]
    if len(given) > 1:
        raise ValueError("an example has either image or images, not both")
    if not given:
        return []
    value = example[given[0]]
    return list(value) if isinstance(value, list | tuple) else [value]


def image_features(image: np.ndarray | ImageFeatures, settings: ImageSettings) -> ImageFeatures:
    """The features of an image that may have been preprocessed already."""
    return image if isinstance(image, ImageFeatures) else preprocess_image(image, settings)


def image_arrays(features: ImageFeatures) -> dict[str, np.ndarray | None]:
    """The arrays of images under the keys of a preprocessed example."""
    return {"images": features.images, "image_masks": features.image_masks, "pooled_patches_idx": features.pooled_patches_idx}


def build_preprocessor(
    tokenizer: Tokenizer,
    vit: VisionEncoder | None,
    data_formatter: DataFormatter,
    config: ImagePreprocessorConfig,
    *,
    for_inference: bool,
    is_training: bool = True,
    include_image: bool = False,
    max_seq_len: int | None = None,
    kind: type[MolmoPreprocessor] = MolmoPreprocessor,
    **settings: Any,
) -> MolmoPreprocessor:
    """The preprocessor of a model (its configuration's `build_preprocessor` calls this).

    Args:
        vit: configuration of the vision encoder; None = text only.
        kind: class of the preprocessor.
        settings: fields that only `kind` has.
    """
    return kind(
        tokenizer=tokenizer,
        formatter=Formatter(data_formatter, tokenizer.literal),
        limits=config,
        for_inference=for_inference,
        is_training=is_training,
        include_image=include_image,
        max_seq_len=max_seq_len,
        settings=None if vit is None else ImageSettings.from_configs(vit, config),
        config=config,  # type: ignore[arg-type]
        **settings,
    )
