"""Models of this project in lmms-eval, by the entry point `molmo` of the group `lmms_eval.models`:

    python -m lmms_eval --model molmo --model_args model=models:/NAME@champion --tasks realworldqa

Only lmms-eval imports this file; it is none of this project's requirements (docs/evaluation.md says how to install it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from molmo_core.checkpoint import load_model
from molmo_core.generation.engine.limits import EngineLimits
from molmo_core.generation.engine.requests import SamplingParams
from pipelines.data.rejects import Rejected
from pipelines.evaluation.generation import EngineAnswers
from pipelines.model_folder import model_folder

manifest = ModelManifest(model_id="molmo", chat_class_path=f"{__name__}.Molmo")
MAX_NEW_TOKENS = 1024
"""Of a task that sets no limit: what lmms-eval's own models take."""
FAILED = "[LMMS_EVAL_REQUEST_FAILED]"
"""Begins the answer to a question that could not be asked, as with lmms-eval's own models; it counts as wrong."""


class Molmo(lmms):
    """Answers the questions of lmms-eval's tasks by the engine that also serves.

    Args:
        model: `models:/name@alias`, `models:/name/version`, or a checkpoint folder.
        dtype: of the weights; default bfloat16 on a GPU, else float32.
        max_running: answers in work at once.
        device: default `cuda` if there is a GPU.
        batch_size, max_batch_size: lmms-eval gives them to every model; the engine decides by itself.
    """

    is_simple = False

    def __init__(
        self,
        model: str,
        dtype: str | None = None,
        max_running: int = 64,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        number = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
        loaded: Any = load_model(model_folder(model), number, device)
        self._answers = _Answers(loaded.eval(), MAX_NEW_TOKENS, EngineLimits(max_running=int(max_running)))
        self._preprocess = loaded.config.build_preprocessor(for_inference=True, is_training=False)
        self._context: int = loaded.config.llm.max_sequence_length

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in order. What cannot be asked is logged, and its answer says why."""
        problems: dict[int, str] = {}
        found = self._answers(self._prompts(requests, problems))
        texts = []
        for number, (request, answers) in enumerate(tqdm(zip(requests, found, strict=True), "Model Responding", total=len(requests))):
            problem = problems.get(number) or (answers.detail if isinstance(answers, Rejected) else None)
            if problem is not None:
                logger.error(f"{request.task_name} {request.doc_id}: {problem}")
                texts.append(f"{FAILED} {problem}")
            else:
                texts.append(_until(answers[0], request.args[2].get("until", ())))
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("molmo: tasks that compare log-likelihoods are not supported; choose one that generates (generate_until)")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("molmo: tasks of several rounds are not supported; choose one that generates once (generate_until)")

    def _prompts(self, requests: Sequence[Any], problems: dict[int, str]) -> Iterator[list[dict[str, Any]]]:
        for number, request in enumerate(requests):
            _, messages_of, settings, doc_id, task, split = request.args
            try:
                record = _record(ChatMessages(messages=messages_of(self.task_dict[task][split][doc_id])))
                prompt = dict(self._preprocess(record))
                room = self._context - len(prompt["input_ids"])
                if room < 1:
                    raise ValueError(f"the prompt has {len(prompt['input_ids']):,} tokens, the model's context is {self._context:,}")
                prompt["metadata"] = {**(prompt.get("metadata") or {}), "sampling": _sampling(settings, room)}
            except (ValueError, OSError) as error:
                problems[number] = str(error)
                yield []
            else:
                yield [prompt]


class _Answers(EngineAnswers):
    """Each prompt with settings of its own."""

    def params_of(self, prompt: dict[str, Any]) -> SamplingParams:
        return prompt["metadata"]["sampling"]


def _record(conversation: ChatMessages) -> dict[str, Any]:
    """What the preprocessor takes; as the server reads the same messages: parts of text are lines, system messages join the question.

    Raises:
        ValueError: media that a model cannot be shown together, or audio.
    """
    images, videos, audios = conversation.extract_media()
    if audios or len(videos) > 1 or (videos and images):
        raise ValueError(f"{len(images)} images, {len(videos)} videos and {len(audios)} sounds: images, or one video, can be shown")
    turns, words = [], []
    for message in conversation.messages:
        text = "\n".join(part.text for part in message.content if part.type == "text")
        if message.role == "system":
            words.append(text)
        else:
            turns.append({"role": message.role, "content": "\n".join([*words, text])})
            words = []
    record: dict[str, Any] = {"messages": turns, "placeholders": False}
    if images:
        record["images"] = images
    for part in (part for message in conversation.messages for part in message.content if part.type == "video"):
        record |= {"video": part.url, "clip_start": part.start_time, "clip_end": part.end_time}
    return record


def _sampling(settings: Mapping[str, Any], room: int) -> SamplingParams:
    """Of a task's `generation_kwargs`; `do_sample: false` is the most probable token, whatever else they say."""
    temperature = float(settings.get("temperature") or 0.0)
    return SamplingParams(
        max_tokens=min(int(settings.get("max_new_tokens") or MAX_NEW_TOKENS), room),
        temperature=temperature if settings.get("do_sample", temperature > 0) else 0.0,
        top_p=float(settings.get("top_p") or 1.0),
        top_k=int(settings.get("top_k") or 0),
        seed=0,
    )


def _until(text: str, stops: str | Sequence[str]) -> str:
    """A text up to the first of the strings that end it."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
