"""How bodies of requests are read: strictly, and with errors that name the field and say what is wrong with it.

What is not supported is refused by name: an answer that silently lacks what was asked for is worse than an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from molmo_core.config import nearest
from pipelines.serving.errors import ApiError, bad_request, clipped, shown
from pipelines.serving.json_body import check_encodable

NoEffect = Any
"""The type of a field that is taken and has no effect on the answer."""


def as_list(value: Any) -> Any:
    """A single text is a list of it."""
    return [value] if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True, init=False)
class Only:
    """Of the annotated field only these values are taken: those that ask for nothing."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def _check(self, value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in self.values):
            raise PydanticCustomError("unsupported", "not supported")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values)}


class Strict(BaseModel):
    """No unknown fields, no conversion between types; null means that a field is not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema says null, too."""
        result = handler(schema)
        described = handler.resolve_ref_schema(result)
        for name, field in described.get("properties", {}).items():
            if name not in described.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                kept = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                described["properties"][name] = {**kept, "anyOf": [field, {"type": "null"}]} if field else kept
        return result


Body = TypeVar("Body", bound=Strict)


def read(kind: type[Body], body: Any) -> Body:
    """A checked body.

    Raises:
        ApiError: 400; the message names the field and says what is wrong with it.
    """
    if not isinstance(body, dict):
        needed = " and ".join(f"'{name}'" for name, field in kind.model_fields.items() if field.is_required())
        raise bad_request(f"The body must be a JSON object with {needed}.")
    check_encodable(body)
    unknown = sorted(set(body) - set(kind.model_fields))
    if unknown:
        hint = nearest(clipped(unknown[0]), kind.model_fields)
        raise bad_request(f"Unknown field {shown(unknown[0])}.{hint}", unknown[0], "unknown_parameter")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> ApiError:
    """The first problem that pydantic found, in terms of the request."""
    problem = error.errors(include_url=False, include_context=False)[0]
    location = [part for part in problem["loc"] if part != "[key]"]  # where a key is at fault, pydantic says so at its end
    for depth, name, tag in ((2, "content", 4), (0, "response_format", 1), (1, "format", 2)):
        if location[depth : depth + 1] == [name]:
            del location[tag : tag + 1]  # pydantic's tag of the type, not a key of the request
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{clipped(part)}" for part in location).lstrip(".")
    if problem["type"] in ("extra_forbidden", "unsupported"):
        message = f"'{where}' is not supported by this server (its value is {shown(problem['input'])}); leave it out."
        return bad_request(message, where, "unsupported_parameter")
    if problem["type"] == "missing":
        return bad_request(f"'{where}' is missing.", where)
    return bad_request(f"'{where}': {clipped(problem['msg'], 200)}.", where)
