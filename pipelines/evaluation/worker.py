"""One copy of the model that answers the questions of some records: an actor of the evaluation's Ray Data stage."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from molmo_core.checkpoint import load_model
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Records
from pipelines.evaluation.answering import answer
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.prompts import Prompt, Prompts
from pipelines.evaluation.questions import metric_of, score
from pipelines.model_folder import model_folder


class Worker:
    """Answers and scores records; stateless but for the model."""

    def __init__(self, config: EvaluateConfig, model: str, records: Records) -> None:
        device = "cuda" if config.gpus_per_worker else "cpu"
        self._config = config
        self._records = records
        self._model = load_model(model_folder(model), getattr(torch, config.dtype), device)
        self._prompts = Prompts(self._model.config)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Answers the records numbered `id`; `result` is one JSON object a record (`questions`, or `rejected` and why)."""
        results: list[dict[str, Any]] = []
        groups: list[tuple[dict[str, Any], list[Prompt]]] = []
        for i in batch["id"].tolist():
            source, row = self._records.where(i)
            result: dict[str, Any] = {"record": i, "source": source, "row": row}
            results.append(result)
            try:
                groups.append((result, self._prompts(self._records[i])))
            except Rejected as error:
                result |= {"rejected": error.reason, "detail": error.detail}
        inputs = [[prompt.inputs for prompt in prompts] for _, prompts in groups]
        texts = answer(self._model, inputs, self._prompts.collate, self._config.max_new_tokens) if groups else []
        for (result, prompts), predictions in zip(groups, texts, strict=True):
            result["questions"] = [
                self._answer(prompt, prediction.strip()) for prompt, prediction in zip(prompts, predictions, strict=True)
            ]
        return {"result": [json.dumps(result) for result in results]}

    def _answer(self, prompt: Prompt, prediction: str) -> dict[str, Any]:
        question = prompt.question
        return {
            "question": question.text,
            "type": question.type,
            "metric": metric_of(question, self._config, [prompt.image_size]).name,
            "answers": question.answers,
            "prediction": prediction,
            "score": score(question, prediction, self._config, prompt.image_size),
        }
