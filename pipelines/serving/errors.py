"""Errors of the API, in OpenAI's format."""

from __future__ import annotations

import reprlib
from typing import Any

ECHO = 100
"""Characters of a request that an error message repeats at most."""
_LONGEST = 500

_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = ECHO
_short.maxlevel = 2
_short.maxlist = _short.maxdict = 2


class ApiError(Exception):
    """A request that is not answered: `status` is the HTTP status, `param` the part of the request at fault.

    Whatever a request held, message and param are short and can be encoded.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)  # all of them: errors travel between processes
        self.status = status
        self.message = clipped(message, _LONGEST)
        self.param = None if param is None else clipped(param)
        self.code = code

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str] | None:
        """When to try again, if that helps; what is missing, if it is a key."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {"WWW-Authenticate": "Bearer"} if self.status == 401 else None

    def body(self) -> dict[str, Any]:
        """What the client's library turns into its exception."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def queue_full() -> ApiError:
    """More requests than the server holds."""
    return ApiError(429, "The server is busy and its queue is full; try again in a moment.", None, "rate_limit_exceeded")


def unavailable(message: str, code: str) -> ApiError:
    """Nothing is wrong with the request; the model is not there just now."""
    return ApiError(503, message, None, code)


def timed_out(seconds: float) -> ApiError:
    """The answer was not complete in time."""
    return ApiError(504, f"The answer took longer than the {seconds:g} s that this server allows (`timeout_s`).", None, "timeout")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about any error."""
    return error if isinstance(error, ApiError) else ApiError(500, "The server failed on this request; its log says why.")


def clipped(text: str, limit: int = ECHO) -> str:
    """The beginning of a text, such that it can be encoded (half of a surrogate pair is written as its escape)."""
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: Any) -> str:
    """A value of a request as an error message shows it: with quotes, shortened in breadth and depth."""
    return clipped(_short.repr(value))
