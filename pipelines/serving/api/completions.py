"""`POST /v1/completions`: the body of a request, and of its answer. A prompt is continued as it is: no roles are put around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipelines.serving.answer import DONE, Text, event, identity
from pipelines.serving.api.fields import NoEffect, Only, as_list
from pipelines.serving.api.logprobs import LogprobWriter
from pipelines.serving.api.sampling import MAX_CHOICES, MAX_TOP_LOGPROBS, Sampling, Several
from pipelines.serving.choices import Part
from pipelines.serving.errors import ApiError


class CompletionRequest(Sampling, Several):
    """Texts to be continued."""

    prompt: Annotated[
        list[str],
        Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
        BeforeValidator(as_list, json_schema_input_type=str | list[str]),
    ]
    """One or several texts. Names of the text tokenizer's special tokens in them are those tokens, as templates need it."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Length of the answer at most."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Tell the log-probability of each token, and of so many most probable ones."""

    echo: Annotated[Any, Only(False)] = None
    suffix: Annotated[Any, Only("")] = None
    best_of: Annotated[Any, Only(1)] = None
    user: NoEffect = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def top_tokens(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        self.check_stream_options()
        return self


class CompletionFormat:
    """How answers to a completion request are written; those to prompt number p have the indices p * n and on."""

    def __init__(self, request: CompletionRequest, logprobs: LogprobWriter) -> None:
        self._id, self._created = identity("cmpl")
        self._request = request
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}  # of each answer, the characters of the tokens that were told

    def whole(self, texts: Sequence[Text], usage: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return {**self._head(), "choices": [self._choice(i, text) for i, text in enumerate(texts)], "usage": usage}

    def opening(self) -> Iterator[str]:
        """The events before the first text: none."""
        yield from ()

    def part(self, part: Part) -> Iterator[str]:
        """The event of one part."""
        if part.text or part.logprobs or part.finish_reason:
            yield event({**self._head(), "choices": [self._choice(part.index, part)]})

    def closing(self, texts: Sequence[Text], usage: dict[str, int]) -> Iterator[str]:
        """The events after the last part."""
        if self._request.stream_options and self._request.stream_options.include_usage:
            yield event({**self._head(), "choices": [], "usage": usage})
        yield DONE

    def failed(self, error: ApiError) -> Iterator[str]:
        """The events of an error after the first text."""
        yield event(error.body())
        yield DONE

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._request.model}

    def _choice(self, index: int, part: Part | Text) -> dict[str, Any]:
        logprobs = None if self._request.logprobs is None else self._listed(index, part)
        return {"index": index, "text": part.text, "finish_reason": part.finish_reason, "logprobs": logprobs}

    def _listed(self, index: int, part: Part | Text) -> dict[str, Any]:
        content = self._logprobs.content(part.logprobs)
        offsets, at = [], self._offsets.get(index, 0)
        for entry in content:
            offsets.append(at)
            at += len(entry["token"])
        self._offsets[index] = at
        return {
            "tokens": [entry["token"] for entry in content],
            "token_logprobs": [entry["logprob"] for entry in content],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in content],
            "text_offset": offsets,
        }
