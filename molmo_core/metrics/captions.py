"""Captions: ROUGE-L of one, BLEU-4 and CIDEr of a set, as the COCO caption evaluation defines them.

Words are lower-case runs of letters and digits, with inner hyphens and apostrophes; COCO's tokenizer (PTB, in Java) also splits off "'s".
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

from molmo_core.metrics.figures import Figure, interval, summarise
from molmo_core.metrics.registry import register
from molmo_core.metrics.truth import Truth

ORDERS = 4
"""Up to how many words in a row are compared."""
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
_RECALL_WEIGHT = 1.2**2
_LENGTH_SIGMA = 6.0

Words = list[str]
Counts = collections.Counter[tuple[str, ...]]


def words(text: str) -> Words:
    """The words of a text."""
    return _WORD.findall(text.lower())


def _whole(answers: Sequence[str], truths: Sequence[Truth], seed: int) -> dict[str, Figure]:
    candidates = [words(answer) for answer in answers]
    references = [[words(caption) for caption in truth.captions] for truth in truths]
    statistics = np.array([bleu_statistics(candidate, refs) for candidate, refs in zip(candidates, references, strict=True)])
    blue = Figure(float(bleu(statistics.mean(0)[None])[0]), *interval(statistics, seed, bleu), len(statistics))
    return {"bleu_4": blue, **summarise({"cider": cider(candidates, references)}, seed)}


@register("caption", main="rouge_l", needs=("captions",), whole=_whole)
def caption(answer: str, truth: Truth) -> dict[str, float]:
    """ROUGE-L (F with recall weighted 1.2 times) of one caption; of a set also `bleu_4` (0 to 1) and `cider` (0 to 10)."""
    candidate = words(answer)
    common = [(LCSseq.similarity(candidate, reference), len(reference)) for reference in map(words, truth.captions)]
    precision = max((length / len(candidate) for length, _ in common if candidate), default=0.0)
    recall = max((length / total for length, total in common if total), default=0.0)
    weighted = recall + _RECALL_WEIGHT * precision
    return {"rouge_l": (1 + _RECALL_WEIGHT) * precision * recall / weighted if weighted else 0.0}


def ngrams(tokens: Words) -> Counts:
    """How often each run of one to `ORDERS` words occurs."""
    return collections.Counter(tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


def bleu_statistics(candidate: Words, references: Sequence[Words]) -> list[float]:
    """What BLEU sums over a set: matched runs of each order, runs of each order, words, words of the reference of the nearest length."""
    counts = ngrams(candidate)
    most: Counts = collections.Counter()
    for reference in references:
        most |= ngrams(reference)
    matched, total = [0.0] * ORDERS, [0.0] * ORDERS
    for run, count in counts.items():
        matched[len(run) - 1] += min(count, most[run])
        total[len(run) - 1] += count
    nearest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return [*matched, *total, len(candidate), nearest]


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 [n] of sums, or means, of `bleu_statistics` [n, 10]; 0 where no run of four words matches."""
    matched, total, length, reference = sums[:, :ORDERS], sums[:, ORDERS:-2], sums[:, -2], sums[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(matched / total).mean(1))
        penalty = np.exp(np.minimum(0, 1 - reference / length))
    return np.where(matched.min(1) > 0, precision * penalty, 0.0)


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each candidate, 0 to 10: what its runs of words have in common with its references', rare ones weighing more.

    How rare a run is comes from the references of the whole set, so a set of one scores 0.
    """
    counted = [[ngrams(reference) for reference in refs] for refs in references]
    seen = collections.Counter(run for refs in counted for run in set().union(*refs))
    log_n = math.log(len(references))

    def weighted(counts: Counts) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        weights = {run: count * (log_n - math.log(max(seen[run], 1))) for run, count in counts.items()}
        norms = [0.0] * ORDERS
        for run, weight in weights.items():
            norms[len(run) - 1] += weight**2
        return weights, [math.sqrt(norm) for norm in norms], sum(count for run, count in counts.items() if len(run) == 2)

    scores = []
    for candidate, refs in zip(candidates, counted, strict=True):
        own, own_norms, length = weighted(ngrams(candidate))
        total = 0.0
        for reference in refs:
            other, norms, other_length = weighted(reference)
            common = [0.0] * ORDERS
            for run, weight in own.items():
                if run in other:
                    common[len(run) - 1] += min(weight, other[run]) * other[run]
            cosines = [c / (a * b) if a * b else 0.0 for c, a, b in zip(common, own_norms, norms, strict=True)]
            total += sum(cosines) / ORDERS * math.exp(-((length - other_length) ** 2) / (2 * _LENGTH_SIGMA**2))
        scores.append(10 * total / len(refs))
    return scores
