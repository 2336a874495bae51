"""One copy of the model that answers and scores shards of records: an actor of the evaluation's Ray Data stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import ray
import torch

from molmo_core.checkpoint import load_model
from molmo_core.metrics import Target
from molmo_core.metrics.pointing import written_points
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Records
from pipelines.evaluation.answering import answer
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.prompts import Prompt, Prompts
from pipelines.evaluation.questions import Judge, judge
from pipelines.evaluation.results import encode
from pipelines.model_folder import model_folder

TOGETHER = 16
"""Records whose questions are answered in one batch."""


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

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Answers the records of shards; a `shard` and its `file` (`results.encode`) each."""
        size = self._config.shard_records
        shards = [int(shard) for shard in batch["shard"]]
        return {"shard": shards, "file": [encode(self.rows(range(k * size, min(self._total, (k + 1) * size)))) for k in shards]}

    def rows(self, records: range) -> list[dict[str, Any]]:
        """The rows of records (`results.SCHEMA`)."""
        return [row for start in records[::TOGETHER] for row in self._answered(range(start, min(start + TOGETHER, records.stop)))]

    def _answered(self, records: range) -> list[dict[str, Any]]:
        rows: dict[int, list[dict[str, Any]]] = {}
        groups: list[tuple[int, dict[str, Any], list[tuple[Prompt, Judge]]]] = []
        for i in records:
            source, row = self._records.where(i)
            known = {"record": i, "source": source, "row": row}
            try:
                prompts = self._prompts(self._records[i])
                groups.append((i, known, [(prompt, judge(prompt.question, self._config, prompt.image_sizes)) for prompt in prompts]))
            except Rejected as error:
                rows[i] = [known | {"rejected": error.reason, "detail": error.detail}]
        inputs = [[prompt.inputs for prompt, _ in asked] for _, _, asked in groups]
        texts = answer(self._model, inputs, self._prompts.collate, self._config.max_new_tokens) if groups else []
        for (i, known, asked), predictions in zip(groups, texts, strict=True):
            answers = zip(asked, predictions, strict=True)
            rows[i] = [known | {"number": k} | _scored(prompt, by, text.strip()) for k, ((prompt, by), text) in enumerate(answers)]
        return [row for i in records for row in rows[i]]


def _scored(prompt: Prompt, by: Judge, prediction: str) -> dict[str, Any]:
    question, scores = prompt.question, by(prediction)
    return {
        "question": question.text,
        "type": question.type,
        "metric": by.metric.name,
        "answers": question.answers,
        "prediction": prediction,
        "score": scores[by.metric.main],
        "scores": list(scores.items()),
        "true_points": _shares(by.truth.targets or (), prompt.image_sizes[0]),
        "answer_points": _shares(written_points(prediction, by.truth), prompt.image_sizes[0]),
    }


def _shares(points: Iterable[Target], size: tuple[int, int]) -> list[dict[str, float]]:
    """Those of the only image, or of the first, as shares of its width and height."""
    return [{"x": point.x / size[0], "y": point.y / size[1]} for point in points if point.at in (None, 1)]
