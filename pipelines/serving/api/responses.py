"""`POST /v1/responses`: the body of a request. Nothing is kept: a conversation is sent whole, as to chat completions."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from molmo_core.generation.engine.requests import Grammar
from pipelines.serving.api.fields import NoEffect, Only, Strict
from pipelines.serving.api.forms import ANY_OBJECT, ObjectFormat, TextFormat, grammar_of
from pipelines.serving.api.messages import Turn
from pipelines.serving.api.sampling import MAX_TOP_LOGPROBS, Sampling, StreamOptions
from pipelines.serving.errors import bad_request
from pipelines.serving.media.parts import Medium


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class InputImage(Strict):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] = "auto"
    """A hint without effect: the model's own tiling decides the resolution."""
    file_id: Annotated[Any, Only()] = None


class OutputText(Strict):
    """Of an answer that is sent back."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[Any, Only([])] = None
    logprobs: NoEffect = None
    points: NoEffect = None


InputPart = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]


def _parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[InputPart], Field(fail_fast=True), BeforeValidator(_parts, json_schema_input_type=str | list[InputPart])]
    id: NoEffect = None
    status: NoEffect = None
    phase: NoEffect = None

    def turn(self, where: str) -> Turn:
        """The message as a turn; its text parts are joined by a line break."""
        media = [
            Medium("image", part.image_url, f"{where}.content[{j}].image_url")
            for j, part in enumerate(self.content)
            if isinstance(part, InputImage)
        ]
        return Turn(self.role, "\n".join(part.text for part in self.content if not isinstance(part, InputImage)), tuple(media), where)


class FlatSchemaFormat(Strict):
    type: Literal["json_schema"]
    name: str = ""
    description: NoEffect = None
    schema_: dict[str, Any] = Field(default=ANY_OBJECT, alias="schema")
    """A JSON schema."""
    strict: bool = True
    """Without effect: the answer always is of the form."""


class TextConfig(Strict):
    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None
    """What the answer has to be."""
    verbosity: Annotated[Any, Only("medium")] = None


def _messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesRequest(Sampling):
    """A conversation to be continued."""

    FORM: ClassVar[str] = "text.format"

    input: Annotated[
        list[InputMessage],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_messages, json_schema_input_type=str | list[InputMessage]),
    ]
    """A question, or the messages of a conversation."""
    instructions: str | None = None
    """The words of the system, where the model was trained with such."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Length of the answer at most."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Tell the log-probability of each token, and of so many most probable ones."""
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    text: TextConfig | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field(default_factory=dict, max_length=16)
    """Comes back with the answer."""

    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    previous_response_id: Annotated[Any, Only()] = None
    conversation: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None
    background: Annotated[Any, Only(False)] = None
    truncation: Annotated[Any, Only("disabled")] = None
    reasoning: Annotated[Any, Only({}, {"effort": "none"})] = None
    max_tool_calls: NoEffect = None
    store: NoEffect = None
    user: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_retention: NoEffect = None
    service_tier: NoEffect = None

    @property
    def turns(self) -> list[Turn]:
        """The conversation."""
        words = [] if self.instructions is None else [Turn("system", self.instructions, (), "instructions")]
        return words + [message.turn(f"input[{i}]") for i, message in enumerate(self.input)]

    @property
    def new_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def top_tokens(self) -> int | None:
        return (self.top_logprobs or 0) if self.include or self.top_logprobs is not None else None

    @property
    def grammar(self) -> Grammar | None:
        form = self.text.format if self.text else None
        if isinstance(form, FlatSchemaFormat):
            return Grammar("json_schema", json.dumps(form.schema_))
        return grammar_of(form) or super().grammar

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if self.stream_options and not self.stream:
            raise bad_request("'stream_options' needs 'stream': true.", "stream_options")
        if self.text and self.text.format and self.text.format.type != "text" and self.structured_outputs:
            raise bad_request("Give either 'text.format' or 'structured_outputs'.", "structured_outputs")
        return self
