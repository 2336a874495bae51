"""Shards of results: whole or not there, made anew when damaged, of one evaluation only."""

import pytest

from molmo_core.config import ConfigError
from pipelines.evaluation.results import Results, claim, encode

SETTINGS = {"shard_records": 2, "metric": "vqa_score"}


def rows(*records: int) -> list[dict]:
    points = [{"x": 0.5, "y": 0.25}]
    return [{"record": i, "number": k, "type": "t", "score": k / 2, "true_points": points} for i in records for k in range(2)]


@pytest.fixture
def results(tmp_path):
    return claim(tmp_path, SETTINGS, "model", ["r.jsonl", 5], 5)


def test_shards_are_read_back_in_order(results, tmp_path):
    assert [list(results.records_of(k)) for k in results.shards] == [[0, 1], [2, 3], [4]]
    for k in (2, 0, 1):
        results.commit(k, encode(rows(*results.records_of(k))))
    table = next(iter(Results.open(tmp_path).tables(["record", "score"])))
    assert table.to_pydict() == {"record": [0, 0, 1, 1], "score": [0, 0.5, 0, 0.5]}
    assert sum(len(table) for table in results.tables()) == 10
    found = results.rows([4, 0, 4], [1, 0, 0])
    assert [(row["record"], row["number"]) for row in found] == [(4, 1), (0, 0), (4, 0)]
    assert found[0]["true_points"] == [{"x": 0.5, "y": 0.25}]


def test_every_flipped_byte_makes_a_shard_anew_or_changes_nothing(results):
    whole = encode(rows(0, 1))
    results.commit(0, whole)
    expected, refused = results.read(0), 0
    for place in range(0, len(whole), 7):
        results.commit(0, whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        found = results.read(0)
        refused += found is None
        assert found is None or found.to_pylist() == expected.to_pylist(), place
    assert refused > 20
    results.commit(0, whole[:-9])
    assert results.read(0) is None
    assert results.read(1) is None
    with pytest.raises(ConfigError, match=r"shard-000000.parquet: missing or damaged; run the same evaluation again"):
        list(results.tables())


@pytest.mark.parametrize(
    ("settings", "model", "records", "told"),
    [
        ({"metric": "anls"}, "model", ["r.jsonl", 5], "metric changed"),
        ({}, "other", ["r.jsonl", 5], "model changed"),
        ({}, "model", ["r.jsonl", 6], "records changed"),
    ],
)
def test_a_folder_is_of_one_evaluation(results, tmp_path, settings, model, records, told):
    claim(tmp_path, SETTINGS | settings, model, records, 5)  # as long as nothing is in it
    claim(tmp_path, SETTINGS, "model", ["r.jsonl", 5], 5)
    results.commit(0, encode(rows(0, 1)))
    claim(tmp_path, SETTINGS, "model", ["r.jsonl", 5], 5)
    with pytest.raises(ConfigError, match=rf"holds another evaluation \({told}\); choose another output"):
        claim(tmp_path, SETTINGS | settings, model, records, 5)
