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
        Rejected: an answer that is not an option, or could be two.
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
    if not isinstance(options, list | tuple) or not options or not all(isinstance(option, str | int | float) for option in options):
        raise Rejected("record: bad field", f"{row.where}{name} must be a non-empty list of strings, got {reprlib.repr(value)}")
    numbers = row.take_all(*_NUMBERS)
    answers = row.take_all("answer", "answers")
    if len(numbers) > 1 or len(answers) > 1:
        raise Rejected("record: bad field", f"{row.where}{' and '.join(numbers if len(numbers) > 1 else answers)}: give only one of them")
    index = next(iter(numbers.values()), None)
    for field, answer in answers.items():
        meant = _meanings(answer, [str(option) for option in options], task)
        found = f"{row.where}{field} {reprlib.repr(answer)}"
        if index is not None and index not in meant:
            raise Rejected(
                "record: bad field", f"{found} is not option {index!r} of the {name}, as {next(iter(numbers))} says: write one of them"
            )
        if index is None and len(meant) != 1:
            why = f"could mean the {name} {', '.join(map(str, sorted(meant)))}" if meant else f"is none of the {name}"
            raise Rejected("record: bad field", f"{found} {why}: write answer_idx, the number of the right one, from 0")
        index = meant.pop() if index is None else index
    return task if index is None else task | {"answer_idx": index}


def _named(value: dict[str, Any], where: str) -> dict[str, Any]:
    """Options with their names: {"A": text, ...}, or columns {"text": [...], "label": [...]}."""
    texts, labels = value.get("text"), value.get("label")
    if len(value) == 2 and isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
        return {"options": texts, "option_names": labels}
    pairs = {name: option for name, option in value.items() if option is not None}
    if not pairs or any(isinstance(option, list | dict) for option in pairs.values()):
        raise Rejected("record: bad field", f"{where}: a list of texts is needed, found {reprlib.repr(value)}")
    return {"options": list(pairs.values()), "option_names": list(pairs)}


def _meanings(answer: Any, options: list[str], task: dict[str, Any]) -> set[int]:
    """The numbers of the options that an answer can mean: by its number, its text, its letter, or its letter and text."""
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    words = str(answer).strip()
    meant = {i for i, option in enumerate(options) if option.strip() == words} or {
        i for i, option in enumerate(options) if option.strip().casefold() == words.casefold()
    }
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        meant.add(answer)
    elif isinstance(answer, str) and "unlabelled_options" not in task and (letter := _LETTER.fullmatch(words)):
        names = task.get("option_names", string.ascii_uppercase)
        listed = [str(name).strip() for name in names][: len(options)] if isinstance(names, str | list | tuple) else []
        place = next((i for i, name in enumerate(listed) if name.casefold() == letter[1].casefold()), None)
        if place is not None and letter["words"] in (None, options[place].strip()):
            meant.add(place)
    return meant
