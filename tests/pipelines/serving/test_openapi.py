"""The description of the API says what the server takes: no more and no less, as far as a schema can say it."""

import jsonschema
import pytest

from pipelines.serving.api.fields import read
from pipelines.serving.api.openapi import BODIES, Api, takes
from pipelines.serving.errors import ApiError

TEXT = {"role": "user", "content": "x"}
PARTS = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": "x"}]}
VALID = {
    "ChatRequest": [
        {"model": "m", "messages": [TEXT]},
        {"model": "m", "messages": [PARTS, {"role": "assistant", "content": "y", "refusal": None, "annotations": []}, TEXT]},
        {"model": "m", "messages": [TEXT], "stop": "x", "seed": None, "logit_bias": {"5": 1}, "tools": [], "user": {"any": 1}},
        {"model": "m", "messages": [TEXT], "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    ],
    "CompletionRequest": [{"model": "m", "prompt": "x"}, {"model": "m", "prompt": ["x", "y"], "logprobs": 3, "echo": False}],
    "ResponsesRequest": [
        {"model": "m", "input": "x", "text": {"format": {"type": "json_object"}}},
        {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], "metadata": {"a": "b"}},
    ],
    "TokenizeRequest": [{"prompt": "x"}, {"messages": [PARTS]}],
    "DetokenizeRequest": [{"tokens": [1, 2]}],
}
INVALID = {
    "ChatRequest": [
        {"temperature": 3},
        {"n": 0},
        {"tools": [{}]},
        {"other": 1},
        {"logit_bias": {"5": 101}},
        {"logit_bias": {"x": 1}},
        {"messages": []},
        {"stop": 3},
    ],
    "CompletionRequest": [{"prompt": [1]}, {"echo": True}, {"logprobs": 21}],
    "ResponsesRequest": [{"input": 3}, {"background": True}, {"previous_response_id": "x"}, {"include": ["x"]}],
    "TokenizeRequest": [{"add_generation_prompt": False}, {"model": 3}],
    "DetokenizeRequest": [{"tokens": [-1]}, {"tokens": "x"}],
}


@pytest.fixture(scope="module")
def described():
    api = Api()
    for body in BODIES:
        api.post(f"/{body.__name__}", **takes(body))(lambda: None)
    return api.openapi()


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_bodies_are_described_as_they_are_checked(described, body):
    name = body.__name__
    schema = {**described, "$ref": f"#/components/schemas/{name}"}
    validator = jsonschema.Draft202012Validator(schema)
    for valid in VALID[name]:
        read(body, valid)
        validator.validate(valid)
    for wrong in INVALID[name]:
        fields = {**VALID[name][0], **wrong}
        with pytest.raises(ApiError):
            read(body, fields)
        assert not validator.is_valid(fields), fields


def test_the_description_is_complete(described):
    """Every reference leads somewhere; every route says what it takes and what it answers with."""
    schemas = described["components"]["schemas"]

    def references(value):
        if isinstance(value, dict):
            yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    assert {reference.removeprefix("#/components/schemas/") for reference in references(described)} <= set(schemas)
    for route in described["paths"].values():
        assert {"200", "400", "401", "404", "413", "429", "503"} <= set(route["post"]["responses"])
