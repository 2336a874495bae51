"""Looks at the model while it trains: the loss on other data, and answers to a few questions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from molmo_core.config import ConfigError
from molmo_core.models.base import ModelBase
from pipelines.data.config import DataConfig
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records
from pipelines.evaluation.config import ScoringConfig
from pipelines.evaluation.generation import BatchAnswers
from pipelines.evaluation.prompts import Prompt, Prompts
from pipelines.evaluation.questions import Question, judge
from pipelines.training.config import TrainConfig
from pipelines.training.ema import Ema
from pipelines.training.events import Event, Metrics, Note, Samples
from pipelines.training.hooks import Hook, Step
from pipelines.training.mesh import Mesh
from pipelines.training.parallel import all_sum, autocast, first

NO_ANSWER = "media: unreadable URL"
"""The rejection of an image that may come another time."""
SCORING = ScoringConfig()


class Validator(Hook):
    """The mean loss over the same global batches of each dataset, every time."""

    def __init__(
        self,
        config: TrainConfig,
        make_loader: Any,
        model: ModelBase,
        device: torch.device,
        mesh: Mesh,
        send: Callable[[Event], None],
        averaged: Ema | None = None,
    ):
        """With `averaged`, the averaged weights are looked at, too."""
        assert config.validation is not None
        self.averaged = averaged
        self.interval, self.send = config.validation.interval, send
        self.batches, self.precision, self.device, self.model = config.validation.batches, config.precision, device, model
        sizes = {"global_batch_size": config.global_batch_size, "sequence_length": config.sequence_length}
        sizes |= {"seed": config.seed, "rank": mesh.data_rank, "world_size": mesh.data_size}
        self.loaders: dict[str, tuple[Any, Any]] = {}
        """Of each dataset, and its state at the beginning."""
        for name, data in each_alone(config.validation.data).items():
            loader = make_loader(data, config.model, **sizes)
            self.loaders[name] = (loader, loader.state_dict())

    def after_step(self, step: Step) -> None:
        if step.number % self.interval == 0 or step.last:
            values = self.run()
            if self.averaged is not None:
                with self.averaged.applied():
                    values |= {f"{name}_ema": value for name, value in self.run().items()}
            self.send(Metrics(step.number, values))

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """`validation/loss` and `validation/accuracy`, of several datasets also `validation/<name>/loss` and so on; every rank calls it.

        Names have their group in front if there are several.
        """
        self.model.eval()
        values: dict[str, float] = {}
        total = torch.zeros(3)
        for name, (loader, beginning) in self.loaders.items():
            loader.load_state_dict(beginning)
            sums = all_sum(self._sums(loader)).cpu()
            total += sums
            if len(self.loaders) > 1:
                values |= means(f"validation/{name}", sums)
        back_to_training(self.model)
        return means("validation", total) | values

    def _sums(self, loader: Any) -> torch.Tensor:
        """Of this rank: cross entropy, right answers and loss weight."""
        sums = torch.zeros(3, device=self.device)
        batches = iter(loader)
        for batch in itertools.islice(batches, self.batches):
            with autocast(self.precision, self.device):
                metrics = self.model(**batch, return_logits=False).metrics
            sums += (
                torch.stack([metrics["cross_entropy"], metrics["accuracy"], torch.ones_like(metrics["accuracy"])]) * metrics["loss_weight"]
            )
        batches.close()
        return sums


def each_alone(data: DataConfig) -> dict[str, DataConfig]:
    """A configuration for each dataset, with no other in it."""
    groups = data.all_groups()
    found = {}
    for group, settings in groups.items():
        for name, config in settings.datasets.items():
            alone = dataclasses.replace(data, datasets={name: config}, groups={})
            found[name if len(groups) == 1 else f"{group}/{name}"] = alone
    return found


def means(name: str, sums: torch.Tensor) -> dict[str, float]:
    """Loss and accuracy, given their sums and the weight; raises ConfigError if there is none."""
    loss, correct, weight = sums.tolist()
    if weight == 0:
        raise ConfigError(f"validation.data: no token of the batches that validate has a loss weight ({name})")
    return {f"{name}/loss": loss / weight, f"{name}/accuracy": correct / weight}


class Sampler(Hook):
    """Greedy answers to a question of each of the first records; every rank computes the same ones."""

    def __init__(self, config: TrainConfig, model: ModelBase, send: Callable[[Event], None]):
        """Sends a note for each record whose media do not come; every rank calls this."""
        assert config.samples is not None
        self.send = send
        self.settings, self.precision, self.model = config.samples, config.precision, model
        records = open_records(self.settings.records)
        prompts = Prompts(config.model)

        def read() -> list[tuple[int, Prompt]]:
            found = []
            for i in range(min(self.settings.count, len(records))):
                try:
                    for prompt in prompts(records[i], functools.partial(_of_type, turn=i)):
                        judge(prompt.question, SCORING, prompt.image_sizes)  # a question that cannot be scored is told now
                        found.append((i, prompt))
                except Rejected as error:
                    message = f"samples.records: {self.settings.records}: record {i}: {error}"
                    if error.reason != NO_ANSWER:
                        raise ConfigError(message) from None
                    send(Note(f"{message}. The samples do without it."))
            return found

        try:
            self.samples = first(read)
            """Record and prompt: the same ones on every rank, whatever a server answers when."""
        finally:
            prompts.close()

    def after_step(self, step: Step) -> None:
        if step.number % self.settings.interval == 0 or step.last:
            self.send(Samples(step.number, self.run()))

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """An answer for each record, as an evaluation has it; every rank calls it."""
        if not self.samples:
            return []
        # In batches on a GPU, too: an engine would need memory of its own for its cache and whole weights.
        answers = BatchAnswers(self.model, self.settings.max_new_tokens)
        self.model.eval()
        with autocast(self.precision, self.model.device):
            texts = list(answers([prompt.inputs] for _, prompt in self.samples))
        back_to_training(self.model)
        results = []
        for (i, prompt), (text,) in zip(self.samples, texts, strict=True):
            question = prompt.question
            points = judge(question, SCORING, prompt.image_sizes).score(text)
            answer = {"question": question.text, "type": question.type, "answers": question.answers, "prediction": text, "score": points}
            results.append({"record": i, **answer})
        return results


def _of_type(asked: list[Question], turn: int) -> list[Question]:
    """One of a record's questions; successive turns take different types."""
    types = sorted({question.type for question in asked})
    return [question for question in asked if question.type == types[turn % len(types)]][:1]


def back_to_training(model: ModelBase) -> None:
    """After a look without gradients: training mode, and FSDP's gathered parameters freed."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    model.train()
