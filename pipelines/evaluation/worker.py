"""One copy of the model that answers the questions of some records: an actor of the evaluation's Ray Data stage."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from molmo_core.checkpoint import load_model
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import MAX_IMAGE_PIXELS
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Records
from pipelines.evaluation.answering import Example, answer
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.questions import Question, media_of, metric_of, questions, score
from pipelines.model_folder import model_folder


class Worker:
    """Answers and scores records; stateless but for the model."""

    def __init__(self, config: EvaluateConfig, model: str, records: Records) -> None:
        device = "cuda" if config.gpus_per_worker else "cpu"
        self._config = config
        self._records = records
        self._model = load_model(model_folder(model), getattr(torch, config.dtype), device)
        self._preprocess = self._model.config.build_preprocessor(for_inference=True, is_training=False)
        self._collate = self._model.config.build_collator(None, None, include_metadata=False)
        self._builder = ExampleBuilder(self._preprocess, MAX_IMAGE_PIXELS)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Answers the records numbered `id`; `result` is one JSON object a record (`questions`, or `rejected` and why)."""
        results: list[dict[str, Any]] = []
        groups: list[tuple[dict[str, Any], list[Question], list[Example]]] = []
        for i in batch["id"].tolist():
            result: dict[str, Any] = {"record": i}
            results.append(result)
            try:
                groups.append((result, *self._prompts(i)))
            except Rejected as error:
                result["rejected"] = str(error)
        texts = answer(self._model, [prompts for *_, prompts in groups], self._collate, self._config.max_new_tokens) if groups else []
        for (result, asked, prompts), predictions in zip(groups, texts):
            size = _image_size(prompts[0])
            result["questions"] = [
                {
                    "question": question.text,
                    "type": question.type,
                    "metric": metric_of(question, self._config),
                    "answers": question.answers,
                    "prediction": prediction.strip(),
                    "score": score(question, prediction, self._config, size),
                }
                for question, prediction in zip(asked, predictions)
            ]
        return {"result": [json.dumps(result) for result in results]}

    def _prompts(self, i: int) -> tuple[list[Question], list[Example]]:
        """The questions of a record, and the model inputs of each."""
        example = read_record(self._records[i])
        asked = questions(example)
        self._builder.decode(example)
        media = media_of(example)
        try:
            return asked, [self._preprocess({**media, **question.task}) for question in asked]
        except Exception as error:  # whatever is in the record; the reject rate tells a bug from a bad record
            raise Rejected("record: cannot be preprocessed", f"{type(error).__name__}: {error}") from error


def _image_size(example: Example) -> tuple[int, int]:
    """(width, height) of the first image; without one, percent."""
    sizes = example.get("metadata", {}).get("image_sizes")
    return tuple(sizes[0]) if sizes else (100, 100)
