"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipelines.serving.api.fields import Only, Strict
from pipelines.serving.api.messages import Message, Turn, turns_of
from pipelines.serving.api.sampling import TokenId
from pipelines.serving.errors import bad_request


class TokenizeRequest(Strict):
    """A text, or a conversation with all that the model is given of it."""

    model: str | None = None
    prompt: str | None = None
    """A text, as `/v1/completions` continues it."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    """A conversation, as `/v1/chat/completions` answers it; its pictures become tokens, too."""
    add_special_tokens: bool = True
    """Begin a text with the begin token."""
    return_token_strs: bool = False
    """Tell the texts of the tokens, too."""
    add_generation_prompt: Annotated[Any, Only(True)] = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("Give either 'prompt' or 'messages'.", "prompt")
        return self

    @property
    def turns(self) -> list[Turn]:
        return turns_of(self.messages or ())


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
