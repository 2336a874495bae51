"""The description of the API at `/openapi.json`: bodies as they are checked."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from pipelines.serving.api.chat import ChatRequest
from pipelines.serving.api.completions import CompletionRequest
from pipelines.serving.api.fields import Strict
from pipelines.serving.api.responses import ResponsesRequest
from pipelines.serving.api.tokenise import DetokenizeRequest, TokenizeRequest

BODIES: tuple[type[Strict], ...] = (ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
_SCHEMAS = "#/components/schemas/"
_REASONS = {
    400: "Something in the request; the message names the field",
    401: "No API key, or a wrong one",
    404: "Another model",
    413: "The body is larger than this server takes",
    429: "The queue is full; try again in a moment",
    503: "No replica of the model just now; try again in a moment",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class Api(FastAPI):
    """FastAPI, whose description holds the bodies that the routes read themselves."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schemas = super().openapi().setdefault("components", {}).setdefault("schemas", {})
            _, described = models_json_schema([(body, "validation") for body in BODIES], ref_template=_SCHEMAS + "{model}")
            schemas.update(described["$defs"], Error=_ERROR)
        assert self.openapi_schema is not None
        return self.openapi_schema


def takes(body: type[Strict], streams: bool = False) -> dict[str, Any]:
    """What a route says of the body that it reads, of its answers (server-sent events, if it `streams`), and of its refusals."""
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + body.__name__}}}
    answer = {"application/json": {"schema": {"type": "object"}}} | ({"text/event-stream": {}} if streams else {})
    responses = {200: {"description": "The answer", "content": answer}, **refusals(*_REASONS)}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}, "responses": responses}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route says of the errors that it answers with."""
    error = {"application/json": {"schema": {"$ref": _SCHEMAS + "Error"}}}
    return {status: {"description": _REASONS[status], "content": error} for status in statuses}
