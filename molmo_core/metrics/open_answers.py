"""Benchmarks that mix kinds of questions: options with open answers (MMMU, MathVista), letters with words (RealWorldQA, MVBench)."""

from __future__ import annotations

import re
import string

from molmo_core.metrics.answers import clean_prediction, normalise_answer, numbers
from molmo_core.metrics.choices import chosen_letter, chosen_option
from molmo_core.metrics.registry import register
from molmo_core.metrics.truth import Truth

_LETTER = re.compile(r"\(?([A-J])[).]?")
_DECIMALS = 2


@register("choice_or_open", main="correct", needs=("answers",))
def choice_or_open(answer: str, truth: Truth) -> dict[str, float]:
    """MMMU, MathVista (by rules; its published figures let a language model find the answer): the right option, or the right value.

    A number is right if the last one of the answer equals it to two decimals, a text if the answer contains it as words.
    """
    prediction = clean_prediction(answer)
    if truth.option is not None:
        right = truth.options[chosen_option(prediction, truth.options, truth.option_names)] == truth.options[truth.option]
    else:
        right = any(_states(prediction, reference) for reference in truth.answers)
    return {"correct": float(right)}


def _states(prediction: str, reference: str) -> bool:
    value, stated = numbers(reference), numbers(prediction)
    if len(value) == 1 and normalise_answer(reference).lstrip("-+").replace(".", "", 1).isdecimal():
        return bool(stated) and round(stated[-1], _DECIMALS) == round(value[0], _DECIMALS)
    words = normalise_answer(reference)
    return bool(words) and f" {words} " in f" {normalise_answer(prediction)} "


@register("letter_or_text", main="correct", needs=("answers",))
def letter_or_text(answer: str, truth: Truth) -> dict[str, float]:
    """RealWorldQA, MVBench and others whose options stand in the question: the letter where the reference is one, else equal words.

    Words are compared after VQA normalisation.
    """
    prediction = clean_prediction(answer)
    return {"correct": float(any(_same(prediction, reference.strip()) for reference in truth.answers))}


def _same(prediction: str, reference: str) -> bool:
    if letter := _LETTER.fullmatch(reference):
        chosen = chosen_letter(prediction, string.ascii_uppercase[:10])
        return chosen is not None and string.ascii_uppercase[chosen[0]] == letter[1]
    return normalise_answer(prediction) == normalise_answer(reference)
