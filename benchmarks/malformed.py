"""Requests that are wrong in as many ways as possible, made from the server's own OpenAPI document and from whole ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from broken_media import BrokenMedia
from described import bodies

SURROGATE = "\ud83d"
# Numbers are written as they are: JSON's readers meet 1e999, NaN and integers of any size.
NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    -(2**31) - 1,
    2**53 + 1,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e-300,
    1e300,
    1e-45,
    float("inf"),
    float("nan"),
    "",
    " ",
    "0.5",
    "\0",
    "a" * 5_000,
    "\u202e\ufeff",
    SURROGATE,
    "<|image|><|im_end|><|endoftext|>",
    "{{7*7}}",
    "é" * 400,
    "\U0001f600" * 300,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"a": {"a": {}}}},
    [0] * 500,
    {"type": "text"},
    {"type": "image_url"},
    {"type": "video_url"},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"$ref": "#"}}}}},
    {"type": "json_object"},
    {"regex": "(a+)+$"},
    "(" * 300,
    "a{1,100000}",
    {"include_usage": True},
    {"50256": 100, "x": 1},
    {"5": -100},
    ["\n"] * 4,
    [1, 2, 3],
]


class Request(NamedTuple):
    """What is sent."""

    kind: str
    """How it was made."""
    path: str
    body: bytes
    content_type: str = "application/json"


class Malformed:
    """Requests, the same for the same seed, document and model."""

    def __init__(self, document: dict[str, Any], model: str, number: int) -> None:
        self._rng = random.Random(number)
        self._document, self._number = document, number
        self._media = BrokenMedia(self._rng)
        self._schemas = {path: found for path, item in document["paths"].items() if (found := _body_schema(item)) is not None}
        self._whole = {path: [dict(body, model=model) for body in bodies] for path, bodies in WHOLE.items() if path in self._schemas}
        self._model = model

    def requests(self, count: int) -> Iterator[Request]:
        """So many: a quarter of each kind."""
        described = self._described(count // 4)
        for number in range(count):
            match number % 4:
                case 0:
                    yield next(described)
                case 1:
                    yield self._changed()
                case 2:
                    yield self._with_media()
                case _:
                    yield self._bytes()

    def _described(self, count: int) -> Iterator[Request]:
        """As the document describes bodies; most name the right model, so that they get further."""
        each = -(-count // len(self._schemas)) + 1
        drawn = {
            path: bodies(schema, self._document["components"]["schemas"], each, self._number) for path, schema in self._schemas.items()
        }
        while True:
            path = self._rng.choice(list(drawn))
            body = self._rng.choice(drawn[path])
            if isinstance(body, dict) and self._rng.random() < 0.9:
                body = _cheap(dict(body, model=self._model))
            yield Request("described", path, _json(body))

    def _changed(self) -> Request:
        """A whole request with up to three things changed."""
        path = self._rng.choice(list(self._whole))
        body = copy.deepcopy(self._rng.choice(self._whole[path]))
        for _ in range(self._rng.choice([1, 1, 1, 2, 3])):
            body = self._change(body)
        return Request("changed", path, _json(body))

    def _change(self, body: Any) -> Any:
        rng = self._rng
        places = list(_places(body))
        if not places or rng.random() < 0.02:
            return rng.choice(NASTY)
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0 | 1:
                holder[key] = copy.deepcopy(rng.choice(NASTY))
            case 2:
                del holder[key]
            case _ if isinstance(holder, dict):
                names = [name for body in self._schemas.values() for name in _properties(body, self._document)]
                holder[rng.choice([*names, "unknown", "", SURROGATE])] = copy.deepcopy(rng.choice(NASTY))
            case _:
                holder.insert(key, copy.deepcopy(holder[key]))
        return body

    def _with_media(self) -> Request:
        """A conversation with broken media."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": "what is it?"}]
        for _ in range(self._rng.choice([1, 1, 1, 2, 5])):
            kind, url = self._media.url()
            parts.insert(0, {"type": f"{kind}_url", f"{kind}_url": {"url": url}})
        body = {"model": self._model, "messages": [{"role": "user", "content": parts}], "max_tokens": 2, "stream": self._rng.random() < 0.3}
        return Request("media", "/v1/chat/completions", _json(body))

    def _bytes(self) -> Request:
        """A whole request whose bytes are damaged."""
        rng = self._rng
        path = rng.choice(list(self._whole))
        body = bytearray(_json(rng.choice(self._whole[path])))
        content_type = "application/json"
        match rng.randrange(8):
            case 0:
                del body[rng.randrange(len(body)) :]
            case 1 | 2:
                for _ in range(rng.choice([1, 2, 10])):
                    body[rng.randrange(len(body))] = rng.randrange(256)
            case 3:
                body = bytearray(json.dumps(json.loads(body)).encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])))
            case 4:
                opening = rng.choice([b"[", b'{"a":', b"-", b'"\\u', b"9" * 50])
                body = bytearray(opening * rng.choice([100, 1000, 20_000]))
            case 5:
                place = body.index(b":")
                body[place:place] = b' "model", "model"'
            case 6:
                content_type = rng.choice(
                    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json; charset=utf-16", ""]
                )
            case _:
                body = bytearray(rng.randbytes(rng.randrange(2000)))
        return Request("bytes", path, bytes(body), content_type)


_CONTENT = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
_TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": _CONTENT}]
_SAMPLING = {
    "max_tokens": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "n": 1,
    "stop": ["x"],
    "logprobs": True,
    "top_logprobs": 2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.0},
    "min_tokens": 1,
}
WHOLE: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": _TURNS, "max_tokens": 2},
        {"messages": _TURNS, **_SAMPLING},
        {"messages": _TURNS, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
        {
            "messages": _TURNS,
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        },
    ],
    "/v1/completions": [
        {"prompt": "hi", "max_tokens": 2},
        {"prompt": ["a", "b"], "max_tokens": 2, "echo": False, "logprobs": 1, "stream": True},
    ],
    "/v1/responses": [
        {"input": "hi", "max_output_tokens": 2},
        {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 2, "stream": True},
    ],
    "/tokenize": [{"prompt": "hi"}, {"messages": _TURNS}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
"""Requests without fault, by path (without the model's name)."""


def _body_schema(item: dict[str, Any]) -> dict[str, Any] | None:
    return item.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")


def _properties(schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return list(document.get("components", {}).get("schemas", {}).get(name, schema).get("properties", {}))


def _cheap(body: dict[str, Any]) -> dict[str, Any]:
    """With a short answer, which is all that a whole request is wanted for."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int) and body[name] > 8:
            body[name] = 8
    if isinstance(body.get("n"), int) and body["n"] > 4:
        body["n"] = 4
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key or index in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
