"""Multiple choice: options under their usual names, and which of them an answer means."""

from __future__ import annotations

import re
import reprlib
import string
from typing import Any

from pipelines.data.records.fields import Fields
from pipelines.data.rejects import Rejected

_OPTIONS = ("options", "choices", "unlabelled_options")
_NUMBERS = ("answer_idx", "answer_index")
_LETTER = re.compile(r"\(?([A-Za-z0-9])(?:\)|[.:]|\)[.:])?(?:\s+(?P<words>\S.*))?", re.DOTALL)


def read_choices(row: Fields) -> dict[str, Any]:
    """`options` or `unlabelled_options` with `option_names` and, where the row has an answer, `answer_idx`; nothing without options.

    Raises:
        Rejected: an answer that is no option, or could be two.
    """
    given = row.take_all(*_OPTIONS)
    if not given:
        return {}
    if len(given) > 1:
        raise Rejected("record: bad field", f"{row.where}{' and '.join(given)}: give only one of them")
    name, value = next(iter(given.items()))
    task = {"options" if name == "choices" else name: value, **row.take_all("option_names")}
    if isinstance(value, dict):
        task = _named(value, f"{row.where}{name}")
    options = task.get("options", task.get("unlabelled_options"))
    if not isinstance(options, list | tuple):
        return task | row.take_all("answer_idx")  # `check_task` says what is wrong
    numbers = row.take_all(*_NUMBERS)
    answers = row.take_all("answer", "answers")
    if len(numbers) > 1 or len(answers) > 1:
        raise Rejected("record: bad field", f"{row.where}{' and '.join(numbers if len(numbers) > 1 else answers)}: give only one of them")
    if numbers:
        task["answer_idx"] = next(iter(numbers.values()))
    for field, answer in answers.items():
        names = None if "unlabelled_options" in task else task.get("option_names", string.ascii_uppercase)
        meant = _meant(answer, [str(option) for option in options], names, f"{row.where}{field}")
        if task.setdefault("answer_idx", meant) != meant:
            raise Rejected("record: bad field", f"{row.where}{field} means option {meant}, but answer_idx is {task['answer_idx']!r}")
    return task


def _named(value: dict[str, Any], where: str) -> dict[str, Any]:
    """Options with their names: {"A": text, ...}, or columns {"text": [...], "label": [...]}."""
    texts, labels = value.get("text"), value.get("label")
    if len(value) == 2 and isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
        return {"options": texts, "option_names": labels}
    pairs = {name: option for name, option in value.items() if option is not None}
    if not pairs or any(isinstance(option, list | dict) for option in pairs.values()):
        raise Rejected("record: bad field", f"{where}: a list of texts is needed, found {reprlib.repr(value)}")
    return {"options": list(pairs.values()), "option_names": list(pairs)}


def _meant(answer: Any, options: list[str], names: Any, where: str) -> int:
    """The number of the option that an answer means: its number, its text, its letter, or its letter and text."""
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    words = str(answer).strip()
    meant = {i for i, option in enumerate(options) if option.strip() == words} or {
        i for i, option in enumerate(options) if option.strip().casefold() == words.casefold()
    }
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        meant.add(answer)
    elif isinstance(answer, str) and names is not None and (letter := _LETTER.fullmatch(words)):
        listed = [str(name).strip() for name in names][: len(options)]
        place = next((i for i, name in enumerate(listed) if name.casefold() == letter[1].casefold()), None)
        if place is not None and letter["words"] in (None, options[place].strip()):
            meant.add(place)
    if len(meant) != 1:
        why = f"could mean the options {', '.join(map(str, sorted(meant)))}" if meant else "is none of the options"
        advice = "write answer_idx, the number of the right option, from 0"
        raise Rejected("record: bad field", f"{where} {reprlib.repr(answer)} {why}: {advice}")
    return meant.pop()
