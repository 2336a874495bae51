"""The body of a request as plain data. What a parser would choke on or silently change is refused before or while it is parsed."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipelines.serving.errors import bad_request, clipped, shown

MAX_STRUCTURE = 50_000
"""Quotes, brackets and commas of one body: megabytes of them take seconds to parse, in which nobody else is answered."""
_STRUCTURE = b'"[{,'
_SMALL = 64 << 10  # bytes that take less time than a thread to hand them to
_PARSER = ThreadPoolExecutor(1, "json")  # one: the parser holds the interpreter, and two of them would let nobody in between


async def parse_body(body: bytes | bytearray) -> Any:
    """`parse_json` for an event loop: 10 MB hold it up for 11 ms, since only the parser itself keeps the interpreter."""
    if len(body) <= _SMALL:
        return parse_json(body)
    return await asyncio.get_running_loop().run_in_executor(_PARSER, parse_json, body)


def parse_json(body: bytes | bytearray) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ApiError: 400: not JSON, not UTF-8, nested too deeply, too many parts, a key given twice, or a number that JSON does not have.
    """
    characters = np.frombuffer(body, np.uint8)  # counted by numpy, which lets others run meanwhile
    if sum(np.count_nonzero(characters == character) for character in _STRUCTURE) > MAX_STRUCTURE:
        raise bad_request(f"The body holds more than {MAX_STRUCTURE:,} quotes, brackets and commas; this server does not parse it.")
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.") from None
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {clipped(str(error))}.") from None


def check_encodable(value: Any) -> None:
    """Refuses text that cannot be sent: JSON's `\\ud83d` alone is half of a character (a surrogate).

    Raises:
        ApiError: 400; the message shows the text.
    """
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError as error:
                around = item[max(error.start - 20, 0) : error.start + 20]
                raise bad_request(f"The text {shown(around)} holds half of a surrogate pair, which is not a character.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise bad_request(f"The key {shown(twice)} is given twice in one object.", twice)
    return result


def _constant(name: str) -> Any:
    raise bad_request(f"{name} is not a number in JSON.")
