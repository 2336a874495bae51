"""The part of OpenAI's chat completions API that is served: requests, answers and stream chunks.

What is not supported is refused by name: an answer that silently lacks what was asked for is worse than an error. What is taken and
has no effect is listed here (`_NO_EFFECT`, `ImageURL.detail`) and in docs/serving.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from molmo_core.config import nearest
from pipelines.serving.errors import ApiError, bad_request, clipped, shown
from pipelines.serving.json_body import check_encodable

# Fields that have no effect on the answer.
_NO_EFFECT = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
# Fields of which only the value that means "off" is supported.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# The same for the fields of a message: what OpenAI's servers and clients write into an assistant's message that holds text alone.
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": ("",),
    "annotations": ([],),
    "tool_calls": ([],),
    "reasoning": ("",),
    "reasoning_content": ("",),
}
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 1000


class _Strict(BaseModel):
    """No unknown fields, no conversion between types; null means that a field is not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class ImageURL(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """A hint without effect: the model's own tiling decides the resolution."""


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Strict):
    role: Literal["user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(fail_fast=True)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if k not in _NEUTRAL_IN_MESSAGE or v not in _NEUTRAL_IN_MESSAGE[k]}

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """The text parts, joined by a line break."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """The URLs of the image parts."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(_Strict):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 (the default): greedy, so that the same request gives the same answer."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None

    @property
    def new_tokens(self) -> int | None:
        """The limit that the request sets (None: the server's)."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @classmethod
    def parse(cls, body: Any) -> ChatRequest:
        """A checked request.

        Raises:
            ApiError: 400; the message names the field and says what is wrong with it.
        """
        if not isinstance(body, dict):
            raise bad_request("The body must be a JSON object with 'model' and 'messages'.")
        check_encodable(body)
        body = {name: value for name, value in body.items() if value is not None and name not in _NO_EFFECT}
        for name, allowed in _NEUTRAL.items():
            if name in body and body.pop(name) not in allowed:
                raise bad_request(f"'{name}' is not supported by this server; leave it out.", name, "unsupported_parameter")
        unknown = sorted(set(body) - set(cls.model_fields))
        if unknown:
            hint = nearest(clipped(unknown[0]), cls.model_fields)
            raise bad_request(f"Unknown field {shown(unknown[0])}.{hint}", unknown[0], "unknown_parameter")
        try:
            request = cls.model_validate(body)
        except ValidationError as error:
            raise _explained(error) from None
        request._check()
        return request

    def _check(self) -> None:
        for i, message in enumerate(self.messages):
            expected = ("user", "assistant")[i % 2]
            if message.role != expected:
                raise bad_request(
                    f"messages[{i}] has role '{message.role}', expected '{expected}': "
                    "user and assistant messages alternate, the first is the user's.",
                    f"messages[{i}].role",
                )
            if message.role == "user" and not message.text.strip() and not message.images:
                raise bad_request(f"messages[{i}] is empty.", f"messages[{i}].content")
            if message.role == "assistant" and message.images:
                raise bad_request(f"messages[{i}]: only a user's message can hold an image.", f"messages[{i}].content")
        if self.messages[-1].role != "user":
            raise bad_request("The last message must be the user's; it is what the model answers.", "messages")
        if self.stream_options and not self.stream:
            raise bad_request("'stream_options' needs 'stream': true.", "stream_options")
        if len(self.stops) > _MAX_STOPS or not all(0 < len(stop) <= _MAX_STOP_LENGTH for stop in self.stops):
            raise bad_request(f"'stop' takes one to four strings of 1 to {_MAX_STOP_LENGTH:,} characters.", "stop")


def _explained(error: ValidationError) -> ApiError:
    """The first problem that pydantic found, in terms of the request."""
    problem = error.errors(include_url=False, include_context=False)[0]
    location = list(problem["loc"])
    in_message = location[:1] == ["messages"]
    if in_message and location[2:3] == ["content"]:
        del location[4:5]  # pydantic's tag of the part's type, not a key of the request
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{clipped(part)}" for part in location).lstrip(".")
    if in_message and location[-1] == "role" and problem["type"] != "missing":
        role = problem["input"]
        hint = " Molmo has no system prompt: put the instruction into the first user message." if role in ("system", "developer") else ""
        return bad_request(f"'{where}': the role {shown(role)} is not supported; use 'user' or 'assistant'.{hint}", where)
    if problem["type"] == "extra_forbidden":
        message = f"'{where}' is not supported by this server (its value is {shown(problem['input'])}); leave it out."
        return bad_request(message, where, "unsupported_parameter")
    return bad_request(f"'{where}' is missing." if problem["type"] == "missing" else f"'{where}': {clipped(problem['msg'], 200)}.", where)


def completion(request_id: str, created: int, model: str, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
    """The body of a whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def chunk(request_id: str, created: int, model: str, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    """One event of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
    return {"id": request_id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": [choice]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
