"""Answers of a form: OpenAI's `response_format`, and `structured_outputs` as vLLM has it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from molmo_core.generation.engine.requests import Grammar
from pipelines.serving.api.fields import NoEffect, Strict
from pipelines.serving.errors import bad_request

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JSONSchema(Strict):
    name: str = ""
    """Without effect."""
    description: NoEffect = None
    schema_: dict[str, Any] = Field(default=ANY_OBJECT, alias="schema")
    """A JSON schema."""
    strict: bool = True
    """Without effect: the answer always is of the form."""


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


def _as_text(schema: Any) -> Any:
    return json.dumps(schema) if isinstance(schema, dict) else schema


class StructuredOutputs(Strict):
    """Exactly one of these."""

    json_: Annotated[str | None, BeforeValidator(_as_text, json_schema_input_type=dict[str, Any] | str)] = Field(default=None, alias="json")
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    choice: list[str] | None = Field(default=None, min_length=1)
    """One of these strings."""

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice)) != 1:
            raise bad_request("'structured_outputs' takes exactly one of 'json', 'regex' and 'choice'.", "structured_outputs")
        return self

    @property
    def grammar(self) -> Grammar:
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", json.dumps(self.choice))
        return Grammar("json_schema", self.json_ or "")


def grammar_of(form: TextFormat | ObjectFormat | SchemaFormat | None) -> Grammar | None:
    """What an answer of a format has to be."""
    match form:
        case ObjectFormat():
            return Grammar("json_schema", json.dumps(ANY_OBJECT))
        case SchemaFormat():
            return Grammar("json_schema", json.dumps(form.json_schema.schema_))
    return None
