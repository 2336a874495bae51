"""The turns of a conversation, however a form calls them: roles, texts and media parts, weights, the system's words."""

from __future__ import annotations

import reprlib
from collections import Counter
from typing import Any

from pipelines.data.records import unread
from pipelines.data.records.fields import Fields, objects, text
from pipelines.data.records.row_media import Inline
from pipelines.data.rejects import Rejected

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
_PLAIN = {"role", "content"}
_WEIGHTS = ("weight", "loss_weight")
_SWITCHES = ("loss", "train")
_HUGE = 1e300  # JSON has whole numbers that no float holds
_SYSTEM = ("system", "system_prompt", "system_message")
Turn = dict[str, Any]


def read_turns(value: Any, field: str, inline: Inline, counts: Counter[str], system: str = "", strip: bool = False) -> list[Turn]:
    """User and assistant in turn: {"role", "content"}, of an assistant also `weight` if the record gives one.

    Args:
        value: strings, or objects of a role (`role` or `from`) and words (`content` or `value`).
        system: joins the first question, as a system message does.
        strip: without the spaces around the words.
    """
    turns = []
    for i, turn in enumerate(objects(value, field, "record: no messages")):
        where = f"{field}[{i}]"
        if isinstance(turn, str):
            turns.append(_turn(("user", "assistant")[i % 2], turn, where, inline, counts, strip))
            continue
        if not isinstance(turn, dict):
            raise Rejected("record: bad message", f"{where}: a text or an object is needed, found {reprlib.repr(turn)}")
        who, what = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        if turn.get(who) is None or turn.get(what) is None:
            raise Rejected("record: bad message", f"{where}: needs {' and '.join(('from', 'value') if strip else ('role', 'content'))}")
        made = _turn(_role(turn[who], where), turn[what], f"{where}.{what}", inline, counts, strip)
        if turn.keys() != _PLAIN:
            rest = Fields({name: given for name, given in turn.items() if name not in (who, what)}, f"{where}.")
            made |= _weight(rest, made["role"])
            unread.judge(rest, counts, inside=True)
        turns.append(made)
    return _alternating(turns, system)


def read_system(row: Fields) -> str:
    """The words of the system beside a conversation or a question."""
    given = {name: value for name, value in row.take_all(*_SYSTEM).items() if value != ""}
    words = {text(value, f"{row.where}{name}") for name, value in given.items()}
    if len(words) > 1:
        raise Rejected("record: bad field", f"{' and '.join(given)} differ: give only one of them")
    return words.pop() if words else ""


def _turn(role: str, content: Any, where: str, inline: Inline, counts: Counter[str], strip: bool) -> Turn:
    if isinstance(content, list):
        content = "\n".join(filter(None, (_part(part, f"{where}[{k}]", inline, counts) for k, part in enumerate(content))))
    content = text(content, where)
    content = content.strip() if strip else content
    return {"role": role, "content": content if role == "assistant" else inline.without_marks(content)}


def _part(part: Any, where: str, inline: Inline, counts: Counter[str]) -> str:
    """The text of a content part, or none: a medium is noted."""
    if isinstance(part, str):
        return text(part, where)
    given = Fields(part if isinstance(part, dict) else {}, f"{where}.")
    kind = given.take("type")
    if kind == "text":
        words = text(given.take("text"), f"{where}.text")
        unread.judge(given, counts, inside=True)
        return words
    for medium in ("image", "video"):
        if kind in (medium, f"{medium}_url"):
            names = dict.fromkeys((kind, medium, f"{medium}_url", "url", "path"))
            reference = next((given.take(name) for name in names if name in given), None)
            inline.parts[medium] += 1
            if reference is not None:  # else a place for the record's own
                if medium == "video" and (clip := given.take_all("start", "end", "video_start", "video_end")):
                    reference = (reference if isinstance(reference, dict) else {"path": reference}) | clip
                inline.media.append((medium, reference))  # type: ignore[arg-type]
            unread.judge(given, counts, inside=True)
            return ""
    raise Rejected("record: bad message", f"{where}: type {kind!r} is none of text, image, image_url, video, video_url")


def _role(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in ROLES:
        raise Rejected("record: bad message", f"{where}: role {value!r} is none of {', '.join(ROLES)}")
    return ROLES[value]


def _weight(turn: Fields, role: str) -> dict[str, float]:
    """`weight` of an assistant's turn, if it has one; questions are never trained on, so theirs can only be 0."""
    given: dict[str, float] = {}
    for name, value in turn.take_all(*_WEIGHTS, *_SWITCHES).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _SWITCHES and not (isinstance(value, bool) or (number and value in (0, 1))):
            raise Rejected("record: bad field", f"{turn.where}{name} must be true or false, found {reprlib.repr(value)}")
        if name in _WEIGHTS and not (number and 0 <= value < _HUGE):
            raise Rejected("record: bad field", f"{turn.where}{name} must be a number, 0 or more, found {reprlib.repr(value)}")
        given[name] = float(value)
    if len(set(given.values())) > 1:
        raise Rejected("record: bad field", f"{turn.where}{', '.join(given)} contradict each other: write only weight")
    if role != "assistant" and any(given.values()):
        raise Rejected(
            "record: bad field",
            f"{turn.where}{next(iter(given))}: only answers are trained on; a {role}'s message has none, or 0",
        )
    return {"weight": next(iter(given.values()))} if given and role == "assistant" else {}


def _alternating(turns: list[Turn], system: str) -> list[Turn]:
    """User and assistant in turn; the system's words join the first question."""
    if turns[0]["role"] == "system":
        if system and system != turns[0]["content"]:
            raise Rejected("record: bad message", "a system message, and other words in a field beside the messages: give only one of them")
        system, turns = turns[0]["content"], turns[1:]
        if not turns:
            raise Rejected("record: bad message", "only a system message")
    for i, turn in enumerate(turns):
        if turn["role"] != ("user", "assistant")[i % 2]:
            raise Rejected("record: bad message", f"turn {i} is of {turn['role']}; user and assistant take turns, the user begins")
    if len(turns) < 2:
        raise Rejected("record: no answer", "the assistant says nothing")
    return [{**turns[0], "content": f"{system}\n{turns[0]['content']}"}, *turns[1:]] if system else turns
