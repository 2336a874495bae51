"""Held-out rows: chosen by number and seed alone, named in a file that opens as records, refused for other records."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.config import ConfigError
from pipelines.data.records.parts import Part, held_out
from pipelines.data.sources import open_records

SEEDS = st.integers(0, 2**63 - 1)


@settings(deadline=None)
@given(SEEDS, st.integers(0, 3000), st.integers(0, 3000), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_row_is_chosen_by_its_number_the_seed_and_the_share_alone(seed, rows, more, share, larger):
    found = held_out(seed, rows, share)
    assert (found.dtype, len(found)) == (bool, rows)
    np.testing.assert_array_equal(held_out(seed, rows + more, share)[:rows], found)
    share, larger = sorted((share, larger))
    assert not (held_out(seed, rows, share) & ~held_out(seed, rows, larger)).any(), "a larger share only adds rows"


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2, 2**63 - 1])
def test_the_share_is_kept_everywhere(seed, share):
    found = held_out(seed, 100_000, share)
    assert abs(found.mean() - share) < 5 * (share * (1 - share) / 100_000) ** 0.5
    for part in (found[:50_000], found[50_000:], found[::2], found[::3], found[::256]):
        assert abs(part.mean() - share) < 5 * (share * (1 - share) / len(part)) ** 0.5
    other = held_out(seed + 1, 100_000, share)
    assert abs((found & other).mean() - share**2) < 0.01, "another seed is another choice"


def test_the_choice_never_changes():
    assert np.flatnonzero(held_out(0, 60, 0.1)).tolist() == [2, 32, 33, 41, 42, 43, 53]
    assert np.flatnonzero(held_out(7, 60, 0.1)).tolist() == [50, 52]


def write(folder: Path, names=("a", "b"), rows: int = 30) -> Path:
    for name in names:
        lines = [json.dumps({"messages": [f"{name}{i}", "x"]}) for i in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def part_of(path: Path | str, rows: int | None = None, share: float = 0.2) -> tuple[Part, Path]:
    records = open_records(str(path))
    part = Part.of(str(path), "auto", 3, share, rows or len(records), records.stamp)
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / "test.part.json"
    part.write(file)
    return part, file.resolve()


def test_both_parts_are_all_records(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    part, file = part_of(".")
    monkeypatch.chdir("/")
    whole, test = open_records(str(tmp_path)), open_records(str(file))
    train = whole.part(part.others())
    assert len(test) + len(train) == len(whole) == 60, "the file of the part is not a file of records in its folder"
    test, train = pickle.loads(pickle.dumps((test, train)))
    rows = [(test, k, i) for k, i in enumerate(part.numbers())] + [(train, k, i) for k, i in enumerate(part.others())]
    assert sorted(int(i) for *_, i in rows) == list(range(60))
    for records, k, i in rows:
        assert records[k].data == records.text(k).data == whole[i].data
        assert records.where(k) == whole.where(i)
    assert test.stamp != train.stamp != whole.stamp
    assert test.stamp == open_records(str(file)).stamp
    np.testing.assert_array_equal(test.part(np.array([1, 2]))[0].data, test[1].data)


def test_only_the_first_rows_of_a_limit(tmp_path):
    part, file = part_of(write(tmp_path), rows=40)
    assert len(part.numbers()) + len(part.others()) == 40
    assert max(part.numbers()) < 40
    assert len(open_records(str(file))) == len(part.numbers())


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_a_part_without_records_is_refused(tmp_path, share):
    with pytest.raises(ConfigError, match=r"split.test=.*: holds out (0|60) of 60 records"):
        part_of(write(tmp_path), share=share)


def test_other_records_are_refused(tmp_path):
    _, file = part_of(write(tmp_path) / "*.jsonl")
    write(tmp_path, ["a"], rows=31)
    with pytest.raises(ConfigError, match=r"test.part.json: .*a.jsonl was changed since"):
        open_records(str(file))
    write(tmp_path, ["a"])
    assert len(open_records(str(file))) > 0, "the same again"
    write(tmp_path, ["c"])
    with pytest.raises(ConfigError, match="has other files than"):
        open_records(str(file))
    for text in ("{", "[1]", '{"records": "x"}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"not a part of records as jobs\.prepare writes it"):
            open_records(str(file))
    with pytest.raises(ConfigError, match="no such file"):
        open_records(str(tmp_path / "other.part.json"))
