"""The order of examples: a function of seed, stream and position, independent of who asks."""

import collections
import itertools

import numpy as np
import pytest

from molmo_core.config import ConfigError
from pipelines.data.batches.plan import Plan, Stream


def draws(plan, streams, packs):
    made = [Stream(plan, s) for s in range(streams)]
    return [[stream.next() for stream in made] for _ in range(packs)]


def test_every_example_once_an_epoch():
    plan = Plan([30], [1.0], seed=3, num_streams=4)
    seen = collections.Counter(d for batch in draws(plan, 4, 30) for pack in batch for d in pack)
    assert set(seen.values()) == {1}
    assert {(d.epoch, d.row) for d in seen} == set(itertools.product(range(4), range(30)))


def test_fewer_examples_than_streams():
    plan = Plan([3], [1.0], seed=0, num_streams=8)
    batch = [d for pack in draws(plan, 8, 1)[0] for d in pack]
    assert collections.Counter(d.epoch for d in batch) == {0: 3, 1: 3, 2: 2}


def test_order_depends_on_seed_and_epoch_only():
    def order(seed):
        return draws(Plan([50], [1.0], seed, 2), 2, 50)

    assert order(1) == order(1)
    assert order(1) != order(2)
    rows = [[d.row for pack in batch for d in pack] for batch in order(1)]
    flat = list(itertools.chain(*rows))
    assert flat[:50] != flat[50:], "each epoch has an order of its own"
    assert [d.row for batch in draws(Plan([6], [1], 0, 2, shuffle=False), 2, 3) for pack in batch for d in pack] == list(range(6))


def test_mixture_follows_the_rates():
    plan = Plan([1000, 10, 500], [0.5, 0.2, 0.3], seed=0, num_streams=5)
    counts = collections.Counter(d.dataset for batch in draws(plan, 5, 2000) for pack in batch for d in pack)
    np.testing.assert_allclose([counts[i] / 10_000 for i in range(3)], [0.5, 0.2, 0.3], atol=0.02)


def test_state_continues_anywhere():
    plan = Plan([20, 7], [0.7, 0.3], seed=1, num_streams=3)
    stream = Stream(plan, 2)
    states, packs = [], []
    for _ in range(100):
        states.append(stream.state())
        packs.append(stream.next())
    for i in (0, 1, 37, 99):
        fresh = Stream(plan, 2)
        fresh.restore(states[i])
        assert [fresh.next() for _ in range(100 - i)] == packs[i:]


def test_state_of_another_order_is_refused():
    state = Stream(Plan([20], [1.0], 0, 2), 0).state()
    for other in (Plan([21], [1.0], 0, 2), Plan([20], [1.0], 1, 2), Plan([20], [1.0], 0, 4)):
        with pytest.raises(ConfigError, match="other data"):
            Stream(other, 0).restore(state)
