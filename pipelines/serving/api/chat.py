"""`POST /v1/chat/completions`: the body of a request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from molmo_core.generation.engine.requests import Grammar
from pipelines.serving.api.fields import NoEffect, Only, read
from pipelines.serving.api.forms import ResponseFormat, grammar_of
from pipelines.serving.api.messages import Message, Turn, turns_of
from pipelines.serving.api.sampling import MAX_TOP_LOGPROBS, Sampling, Several
from pipelines.serving.errors import bad_request


class ChatRequest(Sampling, Several):
    """A conversation to be continued."""

    FORM: ClassVar[str] = "response_format"

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Length of the answer at most (`max_tokens` is its older name)."""
    logprobs: bool = False
    """Tell the log-probability of each token."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Tell the most probable tokens in place of each token, too."""
    response_format: ResponseFormat | None = None
    """What the answer has to be."""

    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    user: NoEffect = None
    metadata: NoEffect = None
    store: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    service_tier: NoEffect = None

    @classmethod
    def parse(cls, body: Any) -> ChatRequest:
        """A checked request.

        Raises:
            ApiError: 400; the message names the field and says what is wrong with it.
        """
        return read(cls, body)

    @property
    def turns(self) -> list[Turn]:
        """The conversation."""
        return turns_of(self.messages)

    @property
    def grammar(self) -> Grammar | None:
        return grammar_of(self.response_format) or super().grammar

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_tokens(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        self.check_stream_options()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        if grammar_of(self.response_format) and self.structured_outputs:
            raise bad_request("Give either 'response_format' or 'structured_outputs'.", "structured_outputs")
        return self
