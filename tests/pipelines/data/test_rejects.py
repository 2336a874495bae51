"""When unusable records are too many: the share of a source's examples, and of all, wherever they are counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.config import ConfigError
from pipelines.data.rejects import RATE_FROM_ROWS, Rejects, TooManyRejected


def bad(source, n, reason="media: missing file"):
    return [(source, row, reason, "x.png") for row in range(n)]


def test_a_share_is_one_of_the_source_concerned():
    rejects = Rejects(0.1, "data.max_reject_rate")
    rejects.add({"a": 5000, "b": 200}, bad("a", 5) + bad("b", 20))
    rejects.check()
    rejects.add({"b": 1}, [("b", 7, "image: undecodable", "truncated")])
    expected = (
        r"^b: 21 of 201 records rejected, more than data.max_reject_rate=0.1 allows \(20 x media: missing file, 1 x image: undecodable; "
        r"the last one of b is row 7: image: undecodable: truncated\)$"
    )
    with pytest.raises(TooManyRejected, match=expected):
        rejects.check()
    assert issubclass(TooManyRejected, ConfigError)


def test_bad_sources_are_found_however_small_they_are():
    rejects = Rejects(0.2)
    for k in range(10):
        rejects.add({f"part-{k}.jsonl": 20}, bad(f"part-{k}.jsonl", 10))
    with pytest.raises(TooManyRejected, match=r"part-0.jsonl and 9 other files: 100 of 200 records rejected"):
        rejects.check()


def test_nothing_left_is_too_many_whatever_is_allowed():
    rejects = Rejects(1)
    rejects.add({"x": 3}, bad("x", 3, "record: no text"))
    rejects.check()
    with pytest.raises(TooManyRejected, match=r"x: 3 of 3 records rejected, nothing is left \(3 x record: no text"):
        rejects.check(at_end=True)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 300), st.floats(0, 1)), max_size=8), st.floats(0, 1))
def test_the_rule(parts, limit):
    rejects = Rejects(limit)
    totals = {name: [0, 0] for name in ("", *"abc")}
    for source, seen, share in parts:
        rejects.add({source: seen}, bad(source, int(seen * share)))
        for name in ("", source):
            totals[name][0] += seen
            totals[name][1] += int(seen * share)
    assert (rejects.seen.total(), rejects.total, sum(rejects.by_reason().values())) == (totals[""][0], totals[""][1], totals[""][1])
    if any(rejected > limit * max(seen, RATE_FROM_ROWS) for seen, rejected in totals.values()):
        with pytest.raises(TooManyRejected):
            rejects.check()
    else:
        rejects.check()
