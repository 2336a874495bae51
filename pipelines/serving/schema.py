"""Names of the API's bodies for scripts outside; the bodies themselves are described in `pipelines.serving.api`."""

from __future__ import annotations

from typing import Any

from pipelines.serving.answer import usage
from pipelines.serving.api import chat_answer
from pipelines.serving.api.chat import ChatRequest
from pipelines.serving.api.messages import ImageURL, Message
from pipelines.serving.api.sampling import StreamOptions

__all__ = ["ChatRequest", "ImageURL", "Message", "StreamOptions", "completion", "usage"]


def completion(request_id: str, created: int, model: str, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
    """The body of a whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    return chat_answer.completion(request_id, created, model, [choice], usage)
