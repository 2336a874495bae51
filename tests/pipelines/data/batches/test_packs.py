"""From packs to rows: what could not be used is left out and counted as examples of its source."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.data.batches.packs import PackBuilder
from pipelines.data.batches.plan import Draw
from pipelines.data.rejects import Rejected, Rejects, TooManyRejected


class Numbers:
    """A dataset whose rows named as bad are unusable."""

    def __init__(self, name, bad):
        self.name, self.bad = name, bad

    def read(self, draw):
        return {}

    def build(self, draw, example):
        if draw.row in self.bad:
            raise Rejected("record: bad", str(draw.row))
        ids = np.arange(3)
        return {"input_ids": ids, "labels": ids, "loss_masks": np.ones(3, np.float32), "position_ids": ids}

    def where(self, draw):
        return self.name, draw.row


def tried(bad, limit, packs=200, size=10):
    """The rejects of packs of `size` examples, all but the last of dataset a."""
    builder = PackBuilder([Numbers("a", bad), Numbers("b", ())], (3 * size, 8))
    rejects = Rejects(limit)
    for row in builder.rows([[Draw(int(i == size - 1), k * size + i, 0) for i in range(size)] for k in range(packs)]):
        rejects.add(row.tried, row.rejected)
    return rejects


def test_shares_are_of_examples_not_of_packs():
    rejects = tried({5, 1000, 1001}, 0.01)
    assert rejects.seen == {"a": 1800, "b": 200}
    rejects.check()
    with pytest.raises(TooManyRejected, match=r"a: 19 of 1,800 records rejected"):
        tried(set(range(0, 190, 10)), 0.01).check()


def test_a_pack_without_a_usable_example_is_a_row_without_loss():
    (row,) = PackBuilder([Numbers("a", {0, 1})], (8, 8)).rows([[Draw(0, 0, 0), Draw(0, 1, 0)]])
    assert row.example["loss_masks"].tolist() == [0.0]
    assert row.tried == {"a": 2}
    assert row.rejected == [("a", 0, "record: bad", "0"), ("a", 1, "record: bad", "1")]
