"""Looks at the model while it trains: the loss on other data, and answers to a few questions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from molmo_core.config import ConfigError
from molmo_core.models.base import ModelBase
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records
from pipelines.evaluation.config import ScoringConfig
from pipelines.evaluation.prompts import Prompt, Prompts
from pipelines.evaluation.questions import Question, judge
from pipelines.training.config import TrainConfig
from pipelines.training.events import Event, Metrics, Note, Samples
from pipelines.training.hooks import Hook, Step
from pipelines.training.mesh import Mesh
from pipelines.training.parallel import all_sum, autocast, first

NO_ANSWER = "media: unreadable URL"
"""The rejection of an image that may come another time."""
SCORING = ScoringConfig()


class Validator(Hook):
    """The mean loss over the same global batches every time."""

    def __init__(
        self, config: TrainConfig, make_loader: Any, model: ModelBase, device: torch.device, mesh: Mesh, send: Callable[[Event], None]
    ):
        assert config.validation is not None
        self.interval, self.send = config.validation.interval, send
        self.batches, self.precision, self.device, self.model = config.validation.batches, config.precision, device, model
        sizes = {"global_batch_size": config.global_batch_size, "sequence_length": config.sequence_length}
        self.loader = make_loader(
            config.validation.data, config.model, **sizes, seed=config.seed, rank=mesh.data_rank, world_size=mesh.data_size
        )
        self.beginning = self.loader.state_dict()

    def after_step(self, step: Step) -> None:
        if step.number % self.interval == 0 or step.last:
            self.send(Metrics(step.number, self.run()))

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """`validation/loss` and `validation/accuracy`; every rank calls it."""
        self.loader.load_state_dict(self.beginning)
        self.model.eval()
        sums = torch.zeros(3, device=self.device)
        batches = iter(self.loader)
        for batch in itertools.islice(batches, self.batches):
            with autocast(self.precision, self.device):
                metrics = self.model(**batch, return_logits=False).metrics
            sums += (
                torch.stack([metrics["cross_entropy"], metrics["accuracy"], torch.ones_like(metrics["accuracy"])]) * metrics["loss_weight"]
            )
        batches.close()
        back_to_training(self.model)
        loss, correct, weight = all_sum(sums).tolist()
        if weight == 0:
            raise ConfigError("validation.data: no token of the batches that validate has a loss weight")
        return {"validation/loss": loss / weight, "validation/accuracy": correct / weight}


class Sampler(Hook):
    """Greedy answers to a question of each of the first records; every rank computes the same ones."""

    def __init__(self, config: TrainConfig, model: ModelBase, send: Callable[[Event], None]):
        """Sends a note for each record whose media do not come; every rank calls this."""
        assert config.samples is not None
        self.send = send
        self.settings, self.precision, self.model = config.samples, config.precision, model
        records = open_records(self.settings.records)
        prompts = Prompts(config.model)
        self.collate = prompts.collate

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
        prompts = [prompt.inputs for _, prompt in self.samples]
        self.model.eval()
        with autocast(self.precision, self.model.device):
            known = [example.get("metadata") for example in prompts]
            texts = self.model.generate(**self.collate(prompts), metadata=known, max_new_tokens=self.settings.max_new_tokens).text
        back_to_training(self.model)
        results = []
        for (i, prompt), text in zip(self.samples, texts, strict=True):
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
