"""Figures of a report: intervals over records, and what only a whole set has."""

import pytest

from pipelines.evaluation.report import Tally, of_sets, summarise
from pipelines.evaluation.results import Results, encode

CAPTIONS = [("a dog on a mat", "a dog on a mat"), ("a cat in the house", "a cat in a tree"), ("a red big bus", "two men")]


def results(folder, rows: list[dict]) -> tuple[Results, Tally]:
    found, tally = Results(folder, len(rows), 2), Tally()
    for shard in found.shards:
        found.commit(shard, encode([rows[i] for i in found.records_of(shard)]))
    for table in found.tables():
        tally.add(table)
    return found, tally


def row(record: int, kind: str, metric: str, scores: dict[str, float], **more) -> dict:
    main = next(iter(scores.values()))
    return {"record": record, "number": 0, "type": kind, "metric": metric, "score": main, "scores": list(scores.items()), **more}


def test_captions_have_bleu_and_cider_of_the_set(tmp_path):
    rows = [
        row(i, "caption", "caption", {"rouge_l": 0.5}, prediction=answer, answers=[truth]) for i, (answer, truth) in enumerate(CAPTIONS)
    ]
    rows.append(row(3, "demo", "exact_match", {"exact_match": 1}, prediction="x", answers=["x"]))
    found, tally = results(tmp_path, rows)
    sets = of_sets(found, tally.kinds)
    assert list(sets) == [0]
    figures = summarise(tally, sets)["types"]
    assert list(figures["caption"]["scores"]) == ["rouge_l", "bleu_4", "cider"]
    # Alike are 8 of 14 words, 6 of 11 pairs, 4 of 8 triples and 2 of 5 runs of four; references are 2 words shorter: no penalty.
    expected = (8 / 14 * 6 / 11 * 4 / 8 * 2 / 5) ** 0.25
    assert figures["caption"]["scores"]["bleu_4"]["score"] == pytest.approx(expected, abs=1e-4)
    assert figures["caption"]["scores"]["cider"]["low"] <= figures["caption"]["scores"]["cider"]["score"]
    assert list(figures["demo"]["scores"]) == ["exact_match"]


def test_questions_about_one_image_count_as_one_for_the_interval(tmp_path):
    """Twenty questions about each of two images, all right about one and all wrong about the other: nothing is known of the next."""
    rows = [row(i // 20, "demo", "exact_match", {"exact_match": float(i < 20)}, prediction="x", answers=["x"]) for i in range(40)]
    _, tally = results(tmp_path, rows)
    figures = summarise(tally, {})
    assert (figures["overall"], figures["low"], figures["high"]) == (0.5, 0, 1)
    assert figures["types"]["demo"]["scores"]["exact_match"] == {"score": 0.5, "low": 0, "high": 1}
