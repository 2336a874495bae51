"""The report of an evaluation: figures by type of question, made from the shards' files, one after the other."""

from __future__ import annotations

import collections
import dataclasses
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from molmo_core import metrics
from molmo_core.config import ConfigError
from pipelines.data.sources import Records
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.confusion import Confusion
from pipelines.evaluation.examples import examples, sample, worst
from pipelines.evaluation.page import write_page
from pipelines.evaluation.picture import draw_answers, spread
from pipelines.evaluation.results import Results
from pipelines.files import write_text

SEED = 0
"""Of the intervals."""
REPORT, PAGE, PICTURE = "report.json", "report.html", "answers.png"


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    figures: dict[str, Any]
    """`report.json`: `model`, `set` (the records), `records`, `rejected`, `reasons` ({reason: number}), `questions` (number), `overall`
    (mean score of all questions but pointing), `types` ({type: {questions, metric, score, scores}}), `seconds`. `low` and `high`
    beside a score are its 95 % interval; `scores` are all that the metric gives, by name."""
    results: Results

    def scores(self) -> pa.Table:
        """Every question's `record`, `number` (in its record), `type`, `metric` and `score`, ordered by the first two: what is needed to
        compare evaluations of the same records question by question."""
        tables = self.results.tables(("record", "number", "type", "metric", "score"))
        return pa.concat_tables([table.filter(pc.is_valid(table.column("number"))) for table in tables])


class Tally:
    """What is kept while the shards go by: of every question numbers only, 41 bytes and more for metrics of several scores."""

    def __init__(self) -> None:
        self.reasons: collections.Counter[str] = collections.Counter()
        self.kinds: list[tuple[str, str]] = []
        """(type, metric), in the order they came."""
        self.scores: list[dict[str, tuple[array[float], array[int]]]] = []
        """Of each of them: all scores by name, with their records."""
        self.confusion = Confusion()
        self._kind, self._record, self._number, self._score = array("i"), array("q"), array("i"), array("d")

    def add(self, table: pa.Table) -> None:
        """Takes a shard."""
        self.reasons.update(reason for reason in table.column("rejected").to_pylist() if reason is not None)
        for row in table.filter(pc.is_valid(table.column("number"))).to_pylist():
            kind = row["type"], row["metric"]
            if kind not in self.kinds:
                self.kinds.append(kind)
                self.scores.append(collections.defaultdict(lambda: (array("d"), array("q"))))
            code = self.kinds.index(kind)
            self._kind.append(code)
            self._record.append(row["record"])
            self._number.append(row["number"])
            self._score.append(row["score"])
            for name, value in row["scores"]:
                values, records = self.scores[code][name]
                values.append(value)
                records.append(row["record"])
            self.confusion.add(row["type"], row["metric"], row["answers"] or [], row["prediction"] or "")

    @property
    def kind(self) -> np.ndarray:
        """int32 [questions], into `kinds`."""
        return np.asarray(self._kind)

    @property
    def record(self) -> np.ndarray:
        """int64 [questions]."""
        return np.asarray(self._record)

    @property
    def number(self) -> np.ndarray:
        """int32 [questions], in the record."""
        return np.asarray(self._number)

    @property
    def score(self) -> np.ndarray:
        """float64 [questions]."""
        return np.asarray(self._score)


TALLIED = ("record", "number", "type", "metric", "score", "scores", "answers", "prediction", "rejected")


def finished_report(folder: Path, results: Results) -> Report | None:
    """The report that is in a folder, None if there is none."""
    path = folder / REPORT
    return Report(json.loads(path.read_text(encoding="utf-8")), results) if path.is_file() else None


def read_report(config: EvaluateConfig) -> Report:
    """The report that an evaluation left in `output`.

    Raises:
        ConfigError: there is none of this model.
    """
    folder = Path(config.output)
    report = finished_report(folder, Results.open(folder))
    if report is None:
        raise ConfigError(f"{folder / REPORT}: no such report; evaluate first")
    if report.figures["model"] != config.model:
        raise ConfigError(f"{folder / REPORT} is of {report.figures['model']}, not of {config.model}")
    return report


def write_report(config: EvaluateConfig, results: Results, records: Records, seconds: float) -> Report:
    """Makes the report of finished shards: figures, a page and a picture."""
    folder, tally = Path(config.output), Tally()
    for table in results.tables(TALLIED):
        tally.add(table)
    known = {"model": config.model, "set": config.records, "records": results.records}
    figures = {**known, **summarise(tally, of_sets(results, tally.kinds)), "seconds": round(seconds, 1)}

    def rows(chosen: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        return results.rows(tally.record[chosen].tolist(), tally.number[chosen].tolist())

    draw_answers(rows(spread(tally.kind, tally.record, config.samples)), records).save(folder / PICTURE)
    lowest, drawn = worst(tally.kind, tally.score, config.examples), sample(len(tally.score), config.examples)
    shown = examples(rows(np.concatenate([lowest, drawn])), records)
    write_page(folder / PAGE, figures, tally.confusion.tables(), shown[: len(lowest)], shown[len(lowest) :])
    write_text(folder / REPORT, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")  # last: what makes the evaluation finished
    return Report(figures, results)


def of_sets(results: Results, kinds: Sequence[tuple[str, str]]) -> dict[int, dict[str, metrics.Figure]]:
    """The figures of the kinds (by their number) whose metrics also judge a set as a whole (BLEU, CIDEr), which takes its texts."""
    wholes = {kind: (code, whole) for code, kind in enumerate(kinds) if (whole := metrics.metric(kind[1]).whole)}
    answers: dict[tuple[str, str], list[str]] = {kind: [] for kind in wholes}
    truths: dict[tuple[str, str], list[metrics.Truth]] = {kind: [] for kind in wholes}
    for table in results.tables(("number", "type", "metric", "prediction", "answers")) if wholes else ():
        for row in table.filter(pc.is_valid(table.column("number"))).to_pylist():
            if (kind := (row["type"], row["metric"])) in wholes:
                answers[kind].append(row["prediction"])
                truths[kind].append(metrics.Truth(captions=row["answers"]))
    return {code: whole(answers[kind], truths[kind], SEED) for kind, (code, whole) in wholes.items()}


def summarise(tally: Tally, sets: Mapping[int, dict[str, metrics.Figure]]) -> dict[str, Any]:
    """The figures. Questions of one record are drawn together for the intervals: they are about the same media.

    Args:
        sets: further figures of kinds (`of_sets`).
    """
    # Pointing is another kind of task; the mean over answers to questions stays comparable to published figures without it.
    names = np.array([metric for _, metric in tally.kinds])
    counted = names[tally.kind] != "pointing" if tally.kinds else slice(None)
    answers = tally.score[counted]
    types = {}
    for code, (kind, metric) in sorted(enumerate(tally.kinds), key=lambda item: item[1]):
        name = kind if sum(kind == other for other, _ in tally.kinds) == 1 else f"{kind} ({metric})"
        own = tally.kind == code
        named = {key: _figure(np.asarray(values), np.asarray(records)) for key, (values, records) in tally.scores[code].items()}
        named |= {key: _rounded(figure) for key, figure in sets.get(code, {}).items()}
        main = _figure(tally.score[own], tally.record[own])
        types[name] = {"questions": int(own.sum()), "metric": metric, **main, "scores": named}
    overall = _figure(answers, tally.record[counted]) if len(answers) else {"score": None, "low": None, "high": None}
    return {
        "rejected": tally.reasons.total(),
        "reasons": dict(tally.reasons.most_common()),
        "questions": len(answers),
        "overall": overall["score"],
        "low": overall["low"],
        "high": overall["high"],
        "types": types,
    }


def _figure(scores: np.ndarray, records: np.ndarray) -> dict[str, float]:
    return _rounded(metrics.summarise({"score": scores.tolist()}, SEED, records.tolist())["score"])


def _rounded(figure: metrics.Figure) -> dict[str, float]:
    return {"score": round(figure.mean, 4), "low": round(figure.low, 4), "high": round(figure.high, 4)}
