"""`POST /v1/responses`: the body of an answer, and the events of a streamed one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.serving.answer import Text, event, identity
from pipelines.serving.api.logprobs import LogprobWriter
from pipelines.serving.api.responses import ResponsesRequest
from pipelines.serving.choices import Part
from pipelines.serving.errors import ApiError


class ResponsesFormat:
    """How the answer to one request is written: as one item, a message with one part."""

    def __init__(self, request: ResponsesRequest, logprobs: LogprobWriter) -> None:
        self._id, self._created = identity("resp")
        self._item_id = identity("msg")[0]
        self._request = request
        self._logprobs = logprobs
        self._number = 0  # of the next event
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def whole(self, texts: Sequence[Text], usage: dict[str, int]) -> dict[str, Any]:
        """The body of an answer, complete or cut off by its limit."""
        (text,) = texts
        status = _status(text)
        return {
            **self._response(status, [self._item(status, [self._part(text)])]),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def opening(self) -> Iterator[str]:
        """The events before the first text."""
        yield self._event("response.created", response=self._response("in_progress", []))
        yield self._event("response.in_progress", response=self._response("in_progress", []))
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place, part=self._part(Text()))

    def part(self, part: Part) -> Iterator[str]:
        """The event of one part."""
        if part.text or part.points or part.logprobs:
            points = {"points": part.points} if part.points else {}
            yield self._event("response.output_text.delta", **self._place, delta=part.text, logprobs=self._of(part), **points)

    def closing(self, texts: Sequence[Text], usage: dict[str, int]) -> Iterator[str]:
        """The events after the last part."""
        (text,) = texts
        part, status = self._part(text), _status(text)
        yield self._event("response.output_text.done", **self._place, text=text.text, logprobs=part["logprobs"])
        yield self._event("response.content_part.done", **self._place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=self._item(status, [part]))
        yield self._event(f"response.{status}", response=self.whole(texts, usage))

    def failed(self, error: ApiError) -> Iterator[str]:
        """The events of an error after the first text: the last one makes OpenAI's client raise it."""
        told = {"code": error.code or "server_error", "message": error.message}
        yield self._event("response.failed", response={**self._response("failed", []), "error": told})
        yield self._event("error", **told, param=error.param, **error.body())

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        request = self._request
        form = request.text.format if request.text else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata,
            "model": request.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_unset=True) if form else {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: Text) -> dict[str, Any]:
        part: dict[str, Any] = {"type": "output_text", "text": text.text, "annotations": [], "logprobs": self._of(text)}
        return {**part, "points": text.points} if text.points else part

    def _of(self, part: Part | Text) -> list[dict[str, Any]]:
        return self._logprobs.content(part.logprobs, no_bytes=[])

    def _event(self, name: str, **body: Any) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1, **body}, name)


def _status(text: Text) -> str:
    return "incomplete" if text.finish_reason == "length" else "completed"
