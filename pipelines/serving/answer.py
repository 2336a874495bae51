"""What is sent for a request: the parts of its answers, in the form of the endpoint that it came by."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

from molmo_core.generation.engine.requests import TokenLogprobs
from pipelines.serving.choices import Choices, Part
from pipelines.serving.errors import ApiError, as_api_error
from pipelines.serving.traces import spans

logger = logging.getLogger(__name__)
DONE = "data: [DONE]\n\n"
"""Ends a stream of completions."""


@dataclasses.dataclass
class Text:
    """One answer as far as it has come."""

    text: str = ""
    logprobs: list[tuple[int, TokenLogprobs]] = dataclasses.field(default_factory=list)
    points: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def add(self, part: Part) -> None:
        self.text += part.text
        self.logprobs += part.logprobs
        self.points += part.points
        self.finish_reason = part.finish_reason


class Format(Protocol):
    """How one endpoint writes answers. Events are server-sent events, ready to be sent."""

    def whole(self, texts: Sequence[Text], usage: dict[str, int]) -> dict[str, Any]: ...

    def opening(self) -> Iterator[str]: ...

    def part(self, part: Part) -> Iterator[str]: ...

    def closing(self, texts: Sequence[Text], usage: dict[str, int]) -> Iterator[str]: ...

    def failed(self, error: ApiError) -> Iterator[str]: ...


class Answer:
    """The answers to one request, and the form in which they are sent."""

    def __init__(self, form: Format, choices: Choices, prompt_tokens: int, streamed: bool, metadata: dict[str, Any]) -> None:
        self._form = form
        self._choices = choices
        self._texts = [Text() for _ in range(len(choices))]
        self._prompt_tokens = prompt_tokens
        self.streamed = streamed
        self.metadata = metadata
        """What the preprocessor says about the prompt, e.g. `image_sizes` [(width, height)]."""

    async def begin(self) -> None:
        """Waits for the first part of a streamed answer: what fails before it still gets an HTTP status."""
        await self._choices.begin()

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        async for part in self._choices.parts():
            self._texts[part.index].add(part)
        spans.answered([text.text for text in self._texts])
        return self._form.whole(self._texts, self._usage())

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events of a streamed answer. What fails from here on can only be told as an event."""
        try:
            for event in self._form.opening():
                yield event
            async for part in self._choices.parts():
                self._texts[part.index].add(part)
                for event in self._form.part(part):
                    yield event
            for event in self._form.closing(self._texts, self._usage()):
                yield event
        except Exception as error:  # of whatever the model or the connection to it raises: logged, and told to the client
            logger.exception("An answer failed while it was streamed")
            for event in self._form.failed(as_api_error(error)):
                yield event
        finally:
            self._choices.cancel()
            spans.answered([text.text for text in self._texts])

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, self._choices.tokens)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens of a request, as completions tell them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def identity(prefix: str) -> tuple[str, int]:
    """The id of an answer, and the time at which it was created."""
    return f"{prefix}-{uuid.uuid4().hex}", int(time.time())


def event(body: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(body, ensure_ascii=False)}\n\n"
