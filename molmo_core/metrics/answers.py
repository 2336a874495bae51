"""Metrics of short answers, by the rules of the benchmarks that made them (VQAv2, ChartQA, DocVQA, AI2D)."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

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


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2 accuracy: min(number of annotators who gave the answer / 3, 1) after normalisation.

    With fewer than three reference answers, one that agrees is enough.
    """
    prediction = normalise_answer(prediction)
    agree = sum(normalise_answer(answer) == prediction for answer in answers)
    return min(agree / min(3, max(len(answers), 1)), 1.0)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers, ignoring case and surrounding blanks."""
    prediction = prediction.strip().lower()
    return float(any(prediction == answer.strip().lower() for answer in answers))


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA: numbers within 5 % of the answer count ("12%" is 0.12), other answers must be equal ignoring case."""
    return float(any(_relaxed_equal(prediction.strip(), answer.strip(), tolerance) for answer in answers))


def _relaxed_equal(prediction: str, answer: str, tolerance: float) -> bool:
    value, target = _number(prediction), _number(answer)
    if value is not None and target:
        return abs(value - target) / abs(target) <= tolerance
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one prediction (DocVQA, InfoVQA): the best over the answers.

    1 - distance / longer length where that distance is below the threshold, else 0; case is ignored.
    """
    best = 0.0
    prediction = prediction.strip().lower()
    for answer in answers:
        answer = answer.strip().lower()
        longest = max(len(answer), len(prediction))
        distance = edit_distance(prediction, answer) / longest if longest else 0.0
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def multiple_choice(prediction: str, options: Sequence[str]) -> int:
    """The option that a reply means: the equal one, else the only one that contains it, else the nearest by edit distance."""
    prediction = prediction.strip().lower()
    lowered = [option.strip().lower() for option in options]
    if prediction in lowered:
        return lowered.index(prediction)
    containing = [i for i, option in enumerate(lowered) if prediction and prediction in option]
    if len(containing) == 1:
        return containing[0]
    distances = [edit_distance(prediction, option) for option in lowered]
    return distances.index(min(distances))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of one character."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char != other))
    return row[-1]
