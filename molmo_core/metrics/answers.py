"""Metrics of short answers, by the rules of the benchmarks that made them (VQAv2, ChartQA, DocVQA)."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from molmo_core.metrics.registry import register
from molmo_core.metrics.truth import Truth

# Right spellings; VQAv2 maps each spelling that lacks one apostrophe to them ("couldnt've" and "couldn'tve" to "couldn't've").
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've she's
should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
_APOSTROPHES = {right[:i] + right[i + 1 :]: right for right in _CONTRACTIONS for i, char in enumerate(right) if char == "'"}

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": 0} | {word: value for value, word in enumerate(_NUMBERS)}

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def clean_prediction(text: str) -> str:
    """The answer within a model's reply (published Molmo evaluation).

    What follows "Answer:" if it is there; else, of several lines, the most frequent one (the first of equals); blanks collapsed.
    """
    text = text.strip()
    if "Answer:" in text:
        return text.split("Answer:", 1)[1].strip()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    return collections.Counter(lines).most_common(1)[0][0] if lines else ""


def normalise_answer(text: str) -> str:
    """The official VQAv2 normalisation: punctuation, case, number words, articles and contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    original, has_digit_comma = text, bool(_DIGIT_COMMA.search(text))
    for mark in _PUNCTUATION:
        at_word_edge = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if at_word_edge or has_digit_comma else " ")
    text = _PERIOD.sub("", text)
    words = [str(NUMBER_WORDS.get(word, word)) for word in text.lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """min(annotators who gave the answer / 3, 1) after normalisation, as the Molmo papers report it.

    With fewer than three reference answers, as many as there are make it right.
    """
    agree = _agreeing(prediction, answers)
    return min(agree / min(3, max(len(answers), 1)), 1.0)


def agreement_of_others(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of VQAEval: each annotator is left out once, the others are counted as in `agreement`, and the results averaged.

    So an answer that three of ten gave is 0.9 right: for those three only two others agree. One difference: VQAEval normalises only
    where the annotators disagree; here case and punctuation never count. With one reference answer there are no others: `agreement`.
    """
    n = len(answers)
    if n < 2:
        return agreement(prediction, answers)
    agree, enough = _agreeing(prediction, answers), min(3, n - 1)
    return (agree * min((agree - 1) / enough, 1.0) + (n - agree) * min(agree / enough, 1.0)) / n


def _agreeing(prediction: str, answers: Sequence[str]) -> int:
    prediction = normalise_answer(prediction)
    return sum(normalise_answer(answer) == prediction for answer in answers)


@register("vqa_score", main="vqa_score", needs=("answers",))
def vqa_score(answer: str, truth: Truth) -> dict[str, float]:
    """VQAv2, OK-VQA, TextVQA: how many annotators gave the answer."""
    prediction = clean_prediction(answer)
    return {
        "vqa_score": agreement(prediction, truth.answers),
        "vqa_score_leave_one_out": agreement_of_others(prediction, truth.answers),
    }


def equals(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, ignoring case and surrounding blanks."""
    prediction = prediction.strip().lower()
    return any(prediction == answer.strip().lower() for answer in answers)


@register("exact_match", main="exact_match", needs=("answers",))
def exact_match(answer: str, truth: Truth) -> dict[str, float]:
    """GQA, TallyQA: the answer is a reference, ignoring case."""
    return {"exact_match": float(equals(clean_prediction(answer), truth.answers))}


@register("relaxed_accuracy", main="relaxed_accuracy", needs=("answers",))
def relaxed_accuracy(answer: str, truth: Truth, *, tolerance: float = 0.05) -> dict[str, float]:
    """ChartQA: numbers may be off by `tolerance` of the reference, other answers must be equal ignoring case.

    `relaxed_accuracy` takes an answer that is a number ("12%" is 0.12). `relaxed_accuracy_in_text` also finds numbers and texts inside a
    longer answer, takes 12 for 12 %, and of a list as reference ("[3, 5]") asks for each entry (SciFi; published Molmo evaluation).
    """
    prediction = clean_prediction(answer)
    return {
        "relaxed_accuracy": float(any(_relaxed_equal(prediction, reference.strip(), tolerance) for reference in truth.answers)),
        "relaxed_accuracy_in_text": float(any(_found_in(prediction, reference.strip(), tolerance) for reference in truth.answers)),
        "exact_match": float(equals(prediction, truth.answers)),
    }


def _relaxed_equal(prediction: str, answer: str, tolerance: float) -> bool:
    value, target = _number(prediction), _number(answer)
    if value is not None and target:
        return _close(value, target, tolerance)
    return prediction.lower() == answer.lower()


def _found_in(prediction: str, answer: str, tolerance: float) -> bool:
    if answer.startswith("[") and answer.endswith("]"):
        return all(_found_in(prediction, entry.strip(" '\""), tolerance) for entry in answer[1:-1].split(","))
    if _relaxed_equal(prediction, answer, tolerance):
        return True
    target = _number(answer)
    if target is None:
        return bool(answer) and answer.lower() in prediction.lower()
    stated = [value for number in numbers(prediction) for value in (number, number / 100)]
    return any(_close(value, target, tolerance) for value in stated)


def _close(value: float, target: float, tolerance: float) -> bool:
    return abs(value - target) <= tolerance * abs(target)


_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3}){1,6}|\d{1,300})(?:\.\d{1,300})?(?![\w])")


def numbers(text: str) -> list[float]:
    """The numbers of a text in order: signs, decimals and commas between thousands are read, "12%" is 12."""
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]


def _number(text: str) -> float | None:
    """The finite number that a text is; "12%" is 0.12."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@register("anls", main="anls", needs=("answers",))
def anls(answer: str, truth: Truth, *, threshold: float = 0.5) -> dict[str, float]:
    """DocVQA, InfoVQA, ST-VQA: average normalised Levenshtein similarity, the best over the answers.

    1 - distance / longer length where that distance is below the threshold, else 0; case is ignored.
    """
    prediction = clean_prediction(answer)
    best = max(similarity(prediction, reference, threshold) for reference in truth.answers)
    return {"anls": best, "exact_match": float(equals(prediction, truth.answers))}


def similarity(prediction: str, answer: str, threshold: float = 0.5) -> float:
    """1 - normalised edit distance of two texts ignoring case, 0 from the threshold on."""
    # The library's shortcut for distances above a cutoff keeps very long texts fast.
    distance = Levenshtein.normalized_distance(prediction.strip().lower(), answer.strip().lower(), score_cutoff=threshold)
    return 1 - distance if distance < threshold else 0.0
