"""One copy of the model that answers and scores shards of records: an actor of the evaluation's Ray Data stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from molmo_core.checkpoint import load_model
from molmo_core.metrics import Target
from molmo_core.metrics.pointing import written_points
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Records
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.generation import answers_of
from pipelines.evaluation.prompts import Prompts
from pipelines.evaluation.questions import Judge, Question, judge
from pipelines.evaluation.results import encode
from pipelines.model_folder import model_folder


class Worker:
    """Answers and scores records; stateless but for the model."""

    def __init__(self, config: EvaluateConfig, model: str, records: Records | ray.ObjectRef[Records], total: int) -> None:
        """
        Args:
            config: of the evaluation.
            model: with its version fixed.
            records: that are evaluated, or where Ray keeps them.
            total: how many of them.
        """
        device = "cuda" if config.gpus_per_worker else "cpu"
        self._config, self._total = config, total
        self._records: Records = ray.get(records) if isinstance(records, ray.ObjectRef) else records
        self._model = load_model(model_folder(model), getattr(torch, config.dtype), device)
        self._prompts = Prompts(self._model.config)
        self._answer = answers_of(self._model, config.max_new_tokens)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Answers the records of shards; a `shard` and its `file` (`results.encode`) each."""
        size = self._config.shard_records
        shards = [int(shard) for shard in batch["shard"]]
        return {"shard": shards, "file": [encode(self.rows(range(k * size, min(self._total, (k + 1) * size)))) for k in shards]}

    def rows(self, records: range) -> list[dict[str, Any]]:
        """The rows of records (`results.SCHEMA`)."""
        rows: dict[int, list[dict[str, Any]]] = {}
        asked: list[tuple[dict[str, Any], list[_Asked]]] = []

        def prompts() -> Iterator[list[dict[str, Any]]]:
            for i in records:
                source, row = self._records.where(i)
                known = {"record": i, "source": source, "row": row}
                try:
                    made = self._prompts(self._records[i])
                    judges = [judge(prompt.question, self._config, prompt.image_sizes) for prompt in made]
                except Rejected as error:
                    rows[i] = [known | _rejected(error)]
                    continue
                asked.append((known, [_Asked(prompt.question, prompt.image_sizes[0], by) for prompt, by in zip(made, judges)]))
                yield [prompt.inputs for prompt in made]

        for k, answers in enumerate(self._answer(prompts())):
            known, questions = asked[k]
            if isinstance(answers, Rejected):
                rows[known["record"]] = [known | _rejected(answers)]
            else:
                scored = (question.scored(text.strip()) for question, text in zip(questions, answers, strict=True))
                rows[known["record"]] = [known | {"number": number} | row for number, row in enumerate(scored)]
        return [row for i in records for row in rows[i]]


def _rejected(error: Rejected) -> dict[str, str]:
    return {"rejected": error.reason, "detail": error.detail}


class _Asked(NamedTuple):
    """A question that waits for its answer; its pixels are not kept."""

    question: Question
    size: tuple[int, int]
    """(width, height) of the first image."""
    by: Judge

    def scored(self, prediction: str) -> dict[str, Any]:
        question, scores = self.question, self.by(prediction)
        return {
            "question": question.text,
            "type": question.type,
            "metric": self.by.metric.name,
            "answers": question.answers,
            "prediction": prediction,
            "score": scores[self.by.metric.main],
            "scores": list(scores.items()),
            "true_points": _shares(self.by.truth.targets or (), self.size),
            "answer_points": _shares(written_points(prediction, self.by.truth), self.size),
        }


def _shares(points: Iterable[Target], size: tuple[int, int]) -> list[dict[str, float]]:
    """Those of the only image, or of the first, as shares of its width and height."""
    return [{"x": point.x / size[0], "y": point.y / size[1]} for point in points if point.at in (None, 1)]
