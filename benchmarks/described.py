"""Bodies that an OpenAPI document describes, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

DEEPEST = 12
"""Levels of one body; what is deeper is anything."""
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


def bodies(schema: dict[str, Any], schemas: dict[str, Any], count: int, number: int) -> list[Any]:
    """So many values of a schema, the same for the same number. `schemas`: those that references name."""
    drawn: list[Any] = []

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(values(schema, schemas))
    def draw(value: Any) -> None:
        drawn.append(value)

    draw()
    return drawn


def values(schema: Any, schemas: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a schema. What it says of patterns and formats is left out: they need not be valid."""
    if not isinstance(schema, dict) or depth > DEEPEST:
        return ANYTHING
    if "$ref" in schema:
        return values(schemas[schema["$ref"].rpartition("/")[2]], schemas, depth)
    if "const" in schema:
        return st.just(schema["const"])
    if schema.get("enum"):
        return st.sampled_from(schema["enum"])
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return st.one_of([values(one, schemas, depth + 1) for one in schema[name]])
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return st.one_of([_of_kind(kind, schema, schemas, depth) for kind in kinds]) if kinds else ANYTHING


def _of_kind(kind: str, schema: dict[str, Any], schemas: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    least, most = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum", schema.get("exclusiveMaximum"))
    match kind:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(least, most)
        case "number":
            return st.floats(least, most, allow_nan=False, allow_infinity=False)
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 40), 1_000))
        case "array":
            inner = values(schema.get("items", schema.get("prefixItems", [True])[0]), schemas, depth + 1)
            return st.lists(inner, min_size=schema.get("minItems", 0), max_size=min(schema.get("maxItems", 4), 50))
        case "object" if "properties" in schema:
            inside = {name: values(inner, schemas, depth + 1) for name, inner in schema["properties"].items()}
            needed = set(schema.get("required", ()))
            return st.fixed_dictionaries(
                {name: inner for name, inner in inside.items() if name in needed},
                optional={name: inner for name, inner in inside.items() if name not in needed},
            )
        case "object":
            return st.dictionaries(st.text(max_size=10), values(schema.get("additionalProperties", True), schemas, depth + 1), max_size=4)
    return ANYTHING
