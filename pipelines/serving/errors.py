"""Errors of the API, in OpenAI's format."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError


class ApiError(Exception):
    """A request that cannot be answered; `status` is the HTTP status, `param` the part of the request at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """What the client's library turns into its exception."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about any error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError):
        return ApiError(503, "The server is busy; try again in a moment.", None, "overloaded")
    if isinstance(error, RayActorError):
        return ApiError(503, "A replica of the model was lost during this answer; try again.", None, "replica_lost")
    return ApiError(500, "The server failed on this request; its log says why.")
