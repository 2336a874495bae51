"""Multiple choice: which option an answer means, by its letter, by its text, or either (AI2D, ScienceQA, A-OKVQA, video benchmarks)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from molmo_core.metrics.answers import clean_prediction
from molmo_core.metrics.registry import register
from molmo_core.metrics.truth import Truth

_PREAMBLE = re.compile(
    r"\W{0,3}(?:the |my |so |thus |therefore |, ){0,3}(?:best |correct |right |final )?(?:answer|option|choice)\b", re.IGNORECASE
)
_IS = re.compile(r" {0,2}(?:is|would be|should be)?[ :*]{0,4}(?:option )?", re.IGNORECASE)
_NAME = re.compile(r"[*\s]{0,3}[(\[]?(\w{1,8})(?P<mark>[)\].:,*]|\s|$)")
_BRACKETED = re.compile(r"[(\[](\w{1,8})[)\]]")


def chosen_letter(answer: str, option_names: Sequence[str]) -> tuple[int, bool] | None:
    """The option whose name an answer states first: "B", "(B) blue", "B. blue", "The answer is B", or the only one in brackets.

    Returns:
        (its number, whether the name stands by itself or is marked as one). "A red circle" may mean A or begin with an article:
        (0, False). None: no name.
    """
    alone = answer.strip(" ().:*[]").casefold()
    for number, option in enumerate(option_names):
        if alone == option.casefold():
            return number, True
    start = 0
    if preamble := _PREAMBLE.match(answer):
        start = _IS.match(answer, preamble.end()).end()  # type: ignore[union-attr]  # it matches nothing, too
    if (name := _NAME.match(answer, start)) and name[1] in option_names:
        return option_names.index(name[1]), not name["mark"].isspace()
    bracketed = {found for found in _BRACKETED.findall(answer) if found in option_names}
    return (option_names.index(bracketed.pop()), True) if len(bracketed) == 1 else None


def nearest_option(answer: str, options: Sequence[str]) -> int:
    """The option of which an answer is the text: the equal one, else the only one that contains it, else the nearest by edit distance."""
    found = _by_text(answer, options)
    if found is not None:
        return found
    answer = answer.strip().lower()
    distances = [Levenshtein.distance(answer, option.strip().lower()) for option in options]
    return distances.index(min(distances))


def _by_text(answer: str, options: Sequence[str]) -> int | None:
    answer = answer.strip().lower()
    lowered = [option.strip().lower() for option in options]
    if answer in lowered:
        return lowered.index(answer)
    containing = [i for i, option in enumerate(lowered) if answer and answer in option]
    return containing[0] if len(containing) == 1 else None


def chosen_option(answer: str, options: Sequence[str], option_names: Sequence[str]) -> int:
    """The option an answer means: the one that it is the text of, else the one whose letter it states, else the nearest text."""
    lowered = [option.strip().lower() for option in options]
    if (text := answer.strip().lower()) in lowered and text not in [name.lower() for name in option_names]:
        return lowered.index(text)
    letter = chosen_letter(answer, option_names)
    if letter is None:
        return nearest_option(answer, options)
    number, sure = letter
    if not sure and (by_text := _by_text(answer, options)) is not None:
        return by_text
    return number


@register("multiple_choice", main="accuracy", needs=("options", "option"))
def multiple_choice(answer: str, truth: Truth) -> dict[str, float]:
    """The right option is meant, by letter or by text."""
    return _right(chosen_option(clean_prediction(answer), truth.options, truth.option_names), truth)


@register("multiple_choice_text", main="accuracy", needs=("options", "option"))
def multiple_choice_text(answer: str, truth: Truth) -> dict[str, float]:
    """The right option is meant, by text alone: letters are texts like others (ScienceQA and A-OKVQA of the published evaluation)."""
    return _right(nearest_option(clean_prediction(answer), truth.options), truth)


@register("multiple_choice_letter", main="accuracy", needs=("options", "option", "option_names"))
def multiple_choice_letter(answer: str, truth: Truth) -> dict[str, float]:
    """The right option's letter is stated; an answer in other words is wrong, and not `valid` (MVBench, Video-MME)."""
    letter = chosen_letter(clean_prediction(answer), truth.option_names)
    return {**_right(None if letter is None else letter[0], truth), "valid": float(letter is not None)}


def _right(number: int | None, truth: Truth) -> dict[str, float]:
    # Options of equal text are equally right.
    assert truth.option is not None
    return {"accuracy": float(number is not None and truth.options[number] == truth.options[truth.option])}
