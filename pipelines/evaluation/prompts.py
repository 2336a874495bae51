"""From a record to what a model is asked: its questions and the inputs of each, for evaluation and for samples while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from molmo_core.preprocessing.media import MediaError
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import MAX_IMAGE_PIXELS
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected, unusable
from pipelines.data.sources import Record
from pipelines.evaluation.questions import Question, media_of, questions

Example = dict[str, Any]


class Prompt(NamedTuple):
    """A question and the model's inputs for it (a preprocessed example)."""

    question: Question
    inputs: Example

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the images; without one, percent."""
        return [(width, height) for width, height in self.inputs.get("metadata", {}).get("image_sizes") or [(100, 100)]]


class Prompts:
    """Makes the prompts of records for a model.

    Args:
        config: of the model.
        builder: makes the inputs of a record's questions (None = the model's own).
    """

    def __init__(self, config: Any, builder: ExampleBuilder | None = None):
        preprocessor = config.build_preprocessor(for_inference=True, is_training=False)
        self._builder = IsolatedBuilder(builder or TaskBuilder(preprocessor, MAX_IMAGE_PIXELS))

    def __call__(self, record: Record, choose: Callable[[list[Question]], list[Question]] = list) -> list[Prompt]:
        """The prompts of a record, or of the questions that `choose` takes.

        Raises:
            Rejected: a record, or media, that cannot be used; also a video that crashes its decoder.
        """
        example = read_record(record)
        asked = choose(questions(example))
        built = self._builder.build({**media_of(example), "tasks": [question.task for question in asked]}, None)
        return [Prompt(question, inputs) for question, inputs in zip(asked, built["inputs"], strict=True)]

    def close(self) -> None:
        """Ends the process that decodes videos; the next video starts another."""
        self._builder.close()


class TaskBuilder(ExampleBuilder):
    """Builds inputs for several tasks about the same media, which are fetched once."""

    def build(self, example: dict[str, Any], rng: np.random.RandomState | None) -> dict[str, Any]:
        """`{"inputs": [a preprocessed example for each of example["tasks"]]}`; raises `Rejected`."""
        media = {key: value for key, value in example.items() if key != "tasks"}
        self.decode(media)
        try:
            return {"inputs": [self.preprocessor({**media, **task, "placeholders": False}) for task in example["tasks"]]}
        except MediaError as error:
            raise unusable("video" if "video" in media else "image", error) from None
        except Exception as error:  # whatever is in the record; the reject rate tells a bug from a bad record
            raise Rejected("record: cannot be preprocessed", f"{type(error).__name__}: {error}") from error
