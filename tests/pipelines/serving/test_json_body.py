"""Bodies that a parser chokes on or changes are refused as the client's mistake, and quickly."""

import asyncio
import json
import threading

import pytest

from pipelines.serving import json_body
from pipelines.serving.errors import ApiError
from pipelines.serving.json_body import MAX_STRUCTURE, check_encodable, parse_body, parse_json


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nul", b"{'a': 1}", b'{"a": 1,}', b"\xff", b'{"a": "\xed\xa0\xbd"}', b'\xef\xbb\xbf{"a": 1}', '{"a": 1}'.encode("utf-16")],
)
def test_not_json(body):
    with pytest.raises(ApiError, match=r"not valid JSON|not UTF-8") as caught:
        parse_json(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("depth", [1000, 3000, 16_000])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_nesting(depth, left, right):
    with pytest.raises(ApiError, match="nested too deeply"):
        parse_json((left * depth + "1" + right * depth).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(number):
    with pytest.raises(ApiError, match=f"{number} is not a number"):
        parse_json(f'{{"temperature": {number}}}'.encode())


def test_huge_numbers():
    with pytest.raises(ApiError, match="not valid JSON"):
        parse_json(b'{"seed": ' + b"9" * 100_000 + b"}")


def test_a_key_given_twice():
    with pytest.raises(ApiError, match="'model' is given twice") as caught:
        parse_json(b'{"model": "a", "x": {}, "model": "b"}')
    assert caught.value.param == "model"


@pytest.mark.parametrize("part", [b"[],", b'{"a":1},', b'"",', b"1,"])
def test_megabytes_of_brackets_are_not_parsed(part, monkeypatch):
    body = b'{"a": [' + part * (8_000_000 // len(part)) + b"1]}"
    monkeypatch.setattr(json_body.json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(ApiError, match="quotes, brackets and commas"):
        parse_json(body)


def test_the_largest_that_is_parsed():
    body = b'{"a": [' + b"[]," * (MAX_STRUCTURE // 2 - 10) + b"1]}"
    assert len(parse_json(body)["a"]) == MAX_STRUCTURE // 2 - 9
    image = b'{"a": "' + b"QUJD" * 5_000_000 + b'"}'
    assert len(parse_json(image)["a"]) == 20_000_000


@pytest.mark.parametrize("value", ["\ud83d", {"\ud83d": 1}, {"a": {"b": ["x", {"c": "é\udc00"}]}}, {"é" * 9000 + "\ud83d": 1}])
def test_half_characters(value):
    with pytest.raises(ApiError, match="surrogate") as caught:
        check_encodable(json.loads(json.dumps(value)))
    assert caught.value.message.encode()
    assert len(caught.value.message) < 200


def test_whole_characters():
    check_encodable(parse_json(b'{"a": "\\ud83d\\ude42 \xf0\x9f\x99\x82"}'))


def test_large_bodies_are_parsed_beside_the_loop(monkeypatch):
    threads = []
    monkeypatch.setattr(json_body, "parse_json", lambda body: threads.append(threading.current_thread()) or parse_json(body))
    whole = b'{"a": "' + b"x" * 100_000 + b'"}'
    assert asyncio.run(parse_body(whole)) == {"a": "x" * 100_000}
    with pytest.raises(ApiError, match="not valid JSON"):
        asyncio.run(parse_body(whole[:-1]))
    assert asyncio.run(parse_body(b"[1]")) == [1]
    assert threads[0] is threads[1] is not threads[2] is threading.main_thread()
