"""One record → one preprocessed example: read, fetch, decode, preprocess. Plain Python; actors and bare loops share it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_core.preprocessing.media import MediaError, load_image
from pipelines.data.records.media import fetch
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected, unusable
from pipelines.data.sources import Record

if TYPE_CHECKING:
    from pipelines.data.records.media import Media


def example_rng(seed: int, dataset: int, epoch: int, index: int) -> np.random.RandomState:
    """The randomness of one example: the same wherever and whenever it is made."""
    return np.random.RandomState(np.random.SeedSequence([seed, dataset, epoch, index]).generate_state(4))


class ExampleBuilder:
    """Makes examples from records.

    Args:
        preprocessor: of the model.
        max_image_pixels: larger images are rejected from their header.
        defaults: fields given to every record that lacks them (e.g. the `message_weight` of a dataset).
    """

    def __init__(self, preprocessor: Any, max_image_pixels: int, defaults: dict[str, Any] | None = None):
        self.preprocessor = preprocessor
        self.max_image_pixels = max_image_pixels
        self.defaults = defaults or {}

    def __call__(self, record: Record, rng: np.random.RandomState) -> dict[str, Any]:
        """The preprocessed example (contract in docs/architecture.md).

        Raises:
            Rejected: whatever is wrong with the record or its media.
        """
        return self.build(self.example(record), rng)

    def example(self, record: Record, counts: Counter[str] | None = None) -> dict[str, Any]:
        """What the preprocessor will be given, media still as references; raises `Rejected`, whatever the record holds. `counts` gets
        the names of the fields that were not used."""
        return {**self.defaults, **read_record(record, counts)}

    def build(self, example: dict[str, Any], rng: np.random.RandomState | None) -> dict[str, Any]:
        """Decodes and preprocesses an `example`; raises `Rejected`."""
        metadata = example.pop("metadata")
        self.decode(example)
        try:
            result = self.preprocessor({**example, "placeholders": False}, rng=rng)
        except MediaError as error:
            raise unusable("video" if "video" in example else "image", error) from None
        except Exception as error:  # of whatever the record holds; the reject rate tells a bug from a bad record
            raise Rejected("record: cannot be preprocessed", f"{type(error).__name__}: {error}") from error
        if not np.any(np.asarray(result.get("loss_masks", 1)) > 0):
            if _untrained(example):
                raise Rejected("record: nothing to train on", "weight is 0 for all of its answers")
            raise Rejected("record: no answer within the sequence length", f"{len(result['input_ids']):,} tokens")
        result["metadata"] = {**metadata, **(result.get("metadata") or {})}
        return result

    def measure(self, record: Record, media: Media, rng: np.random.RandomState) -> tuple[int, int]:
        """Tokens and crops that the call with the same `rng` gives, from what its media measure; a record that will be rejected
        counts as one token."""
        try:
            example = {**self.example(record), "placeholders": False}
            if media.timestamps is not None:
                return self.preprocessor.measure_video(example, media.timestamps, media.fps, rng)
            return self.preprocessor.measure(example, media.image_sizes, rng)
        except Exception:  # the call with the same record says what is wrong with it
            return 1, 0

    def decode(self, example: dict[str, Any]) -> None:
        """Replaces media references: images by uint8 [h, w, 3], a video by what its reader opens."""
        if "image" in example:
            example["image"] = self._image(example["image"], "image")
        elif "images" in example:
            example["images"] = [self._image(ref, f"images[{i}]") for i, ref in enumerate(example["images"])]
        elif "video" in example:
            example["video"] = fetch(example["video"])

    def _image(self, reference: str | bytes, field: str) -> np.ndarray:
        data = fetch(reference)
        try:
            return load_image(data, max_pixels=self.max_image_pixels)  # checks the limit before decoding
        except MediaError as error:
            raise unusable("image", error, f"{field}: ") from None


def _untrained(example: dict[str, Any]) -> bool:
    """Whether all weights of an example are 0."""

    def zero(item: dict[str, Any]) -> bool:
        settings = item.get("message_weight") or example.get("message_weight") or {}
        turns = [turn for turn in item.get("messages", ())[1::2] if isinstance(turn, dict)]
        return item.get("weight") == 0 or settings.get("weight") == 0 or (bool(turns) and all(turn.get("weight") == 0 for turn in turns))

    return example.get("weight") == 0 or all(map(zero, example.get("message_list", [example])))
