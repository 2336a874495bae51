"""`POST /v1/chat/completions`: the body of an answer, and the chunks of a streamed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.serving.answer import DONE, Text, event, identity
from pipelines.serving.api.chat import ChatRequest
from pipelines.serving.api.logprobs import LogprobWriter
from pipelines.serving.choices import Part
from pipelines.serving.errors import ApiError


class ChatFormat:
    """How answers to a chat request are written."""

    def __init__(self, chat: ChatRequest, logprobs: LogprobWriter) -> None:
        self._id, self._created = identity("chatcmpl")
        self._chat = chat
        self._logprobs = logprobs
        self._points = [0] * chat.n  # that were told of each answer

    def whole(self, texts: Sequence[Text], usage: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return completion(self._id, self._created, self._chat.model, [self._choice(i, text) for i, text in enumerate(texts)], usage)

    def opening(self) -> Iterator[str]:
        """The events before the first text."""
        for index in range(self._chat.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def part(self, part: Part) -> Iterator[str]:
        """The events of one part."""
        delta: dict[str, Any] = {"content": part.text} if part.text else {}
        if part.points:
            # OpenAI's client joins lists by the `index` of their entries, as those of tool calls.
            told = self._points[part.index]
            delta["points"] = [{"index": told + i, **point} for i, point in enumerate(part.points)]
            self._points[part.index] += len(part.points)
        if delta or part.logprobs:
            yield self._chunk(part.index, delta, logprobs=self._of(part))
        if part.finish_reason:
            yield self._chunk(part.index, {}, part.finish_reason)

    def closing(self, texts: Sequence[Text], usage: dict[str, int]) -> Iterator[str]:
        """The events after the last part."""
        if self._chat.stream_options and self._chat.stream_options.include_usage:
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        yield DONE

    def failed(self, error: ApiError) -> Iterator[str]:
        """The events of an error after the first text."""
        yield event(error.body())
        yield DONE

    def _choice(self, index: int, text: Text) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text.text, "refusal": None}
        if text.points:
            message["points"] = text.points
        return {"index": index, "message": message, "finish_reason": text.finish_reason, "logprobs": self._of(text)}

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._chat.model}

    def _of(self, part: Part | Text) -> dict[str, Any] | None:
        if self._chat.top_tokens is None:
            return None
        return {"content": self._logprobs.content(part.logprobs), "refusal": None}


def completion(request_id: str, created: int, model: str, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
    """The body of a whole answer."""
    return {"id": request_id, "object": "chat.completion", "created": created, "model": model, "choices": choices, "usage": usage}
