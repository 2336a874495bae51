"""The scheduler: admission, chunks, preemption; played through without a model."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.generation.engine.pages import PagePool
from molmo_core.generation.engine.requests import Request, SamplingParams
from molmo_core.generation.engine.scheduler import Scheduler, Sequence

SIZE = 4


class Rules(NamedTuple):
    horizon: np.ndarray | None
    keys: list[bytes]
    whole: bool


def sequence(length, max_tokens=4, horizon=None, keys=(), whole=False) -> Sequence:
    request = Request({}, SamplingParams(max_tokens=max_tokens))
    rules = Rules(None if horizon is None else np.array(horizon), list(keys), whole)
    return Sequence(request, list(range(length)), length, rules)


def play(scheduler: Scheduler, plan) -> None:
    """Carries a plan out: one more token for whoever has all of its tokens in the cache."""
    scheduler.done(plan)
    ready = [chunk.sequence for chunk in plan.prefill if chunk.end == len(chunk.sequence.tokens)]
    for one in [*ready, *plan.decode]:
        one.tokens.append(0)
        if one.count == one.request.params.max_tokens:
            scheduler.remove(one)


def test_a_request_from_prompt_to_end():
    scheduler = Scheduler(PagePool(10, SIZE), 4, 100)
    one = sequence(6, max_tokens=3)
    scheduler.add(one)
    plan = scheduler.plan()
    assert [(c.start, c.end) for c in plan.prefill] == [(0, 6)]
    assert plan.decode == []
    play(scheduler, plan)
    for computed in (7, 8):
        plan = scheduler.plan()
        assert (plan.prefill, plan.decode) == ([], [one])
        play(scheduler, plan)
        assert scheduler.active == 0 or one.computed == computed
    assert scheduler.active == 0
    assert scheduler.pool.available == 10


def test_long_prompts_are_read_in_chunks_while_others_decode():
    scheduler = Scheduler(PagePool(20, SIZE), 4, 5)
    short, long = sequence(3), sequence(12)
    scheduler.add(short)
    scheduler.add(long)
    plan = scheduler.plan()
    assert [(c.start, c.end) for c in plan.prefill] == [(0, 3)], "a prompt is cut only if it is read alone"
    play(scheduler, plan)
    for start, end in ((0, 5), (5, 10), (10, 12)):
        plan = scheduler.plan()
        assert [(c.start, c.end) for c in plan.prefill] == [(start, end)]
        assert plan.decode == ([short] if short.count < 4 else [])
        play(scheduler, plan)


def test_prompts_are_read_together_up_to_the_budget():
    scheduler = Scheduler(PagePool(500, SIZE), 50, 100)
    for length in (90, 10, 10, 10, 30, 130, 20):
        scheduler.add(sequence(length, max_tokens=9))
    seen = []
    while any(not scheduler.is_decoding(one) for one in [*scheduler.running, *scheduler.waiting]):
        plan = scheduler.plan()
        seen.append([(c.start, c.end) for c in plan.prefill])
        play(scheduler, plan)
    assert seen == [[(0, 90), (0, 10)], [(0, 10), (0, 10), (0, 30)], [(0, 100)], [(100, 130), (0, 20)]]


@pytest.mark.parametrize(("budget", "ends"), [(3, [2, 6, 8]), (5, [2, 7, 8]), (6, [6, 8]), (100, [8])])
def test_chunks_end_where_no_token_sees_ahead(budget, ends):
    """Tokens 2 to 5 see each other."""
    scheduler = Scheduler(PagePool(20, SIZE), 4, budget)
    scheduler.add(sequence(8, horizon=[0, 1, 5, 5, 5, 5, 6, 7]))
    seen = []
    while not seen or seen[-1] < 8:
        plan = scheduler.plan()
        seen += [c.end for c in plan.prefill]
        play(scheduler, plan)
    assert seen == ends


def test_whole_prompts_are_never_cut():
    scheduler = Scheduler(PagePool(20, SIZE), 4, 5)
    scheduler.add(sequence(3))
    scheduler.add(sequence(12, whole=True))
    plan = scheduler.plan()
    assert [(c.start, c.end) for c in plan.prefill] == [(0, 3)]
    play(scheduler, plan)
    assert [(c.start, c.end) for c in scheduler.plan().prefill] == [(0, 12)]


def test_a_prefix_in_the_cache_is_not_read_again():
    scheduler = Scheduler(PagePool(20, SIZE), 4, 100)
    keys = [b"a", b"b", b"c"]
    first, second, third = sequence(10, keys=keys[:2]), sequence(12, keys=keys), sequence(8, keys=keys[:2])
    for one in (first, second, third):
        scheduler.add(one)
    plan = scheduler.plan()
    assert [c.sequence for c in plan.prefill] == [first], "the others wait for what the first is computing"
    play(scheduler, plan)
    plan = scheduler.plan()
    assert [(c.sequence, c.start, c.end) for c in plan.prefill] == [(second, 8, 12), (third, 4, 8)], "one token is always computed"
    assert second.pages[:2] == first.pages[:2]
    assert scheduler.prefix_tokens == 12


def test_who_came_last_is_preempted_and_computed_again():
    scheduler = Scheduler(PagePool(5, SIZE), 4, 100)
    first, second = sequence(7, max_tokens=10), sequence(7, max_tokens=8)
    scheduler.add(first)
    scheduler.add(second)
    order = []
    while scheduler.active:
        plan = scheduler.plan()
        order.append([len(plan.prefill), [one is first for one in plan.decode]])
        play(scheduler, plan)
    assert scheduler.preemptions == 1
    assert (first.count, second.count) == (10, 8)
    assert order[0] == [2, []]
    assert all(first_runs for _, who in order[:10] for first_runs in who[:1]), "who came first goes on"
    assert scheduler.pool.available == 5


def test_what_never_fits_is_refused():
    scheduler = Scheduler(PagePool(4, SIZE), 4, 100)
    with pytest.raises(ValueError, match="may be 17 tokens, but the cache has room for 16"):
        scheduler.add(sequence(9, max_tokens=8))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 10), st.integers(0, 3), st.booleans(), st.integers(0, 6)), min_size=1, max_size=12
    ),
    st.integers(8, 16),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_everybody_is_answered_and_no_page_is_lost(requests, pages, budget, running):
    """Requests of any size that arrive at any time, some of which leave: the others get all of their tokens."""
    pool = PagePool(pages, SIZE)
    scheduler = Scheduler(pool, running, budget)
    waiting = []
    for length, max_tokens, prefix, whole, arrival in requests:
        keys = [] if whole else [f"{prefix}-{i}".encode() for i in range(min(length // SIZE, 2))]
        waiting.append((arrival, sequence(length, min(max_tokens, pages * SIZE - length), keys=keys, whole=whole)))
    leaving = waiting[0][1] if len(waiting) > 2 else None
    step = 0
    while waiting or scheduler.active:
        for arrived in [w for w in waiting if w[0] <= step]:
            waiting.remove(arrived)
            scheduler.add(arrived[1])
        if step == 7 and leaving is not None:
            scheduler.remove(leaving)
        plan = scheduler.plan()
        assert len(scheduler.running) <= running
        assert len({one.slot for one in scheduler.running} & set(range(running))) == len(scheduler.running), "a slot each"
        for one in plan.decode:
            assert one.computed < len(one.pages) * SIZE
        for one, start, end in plan.prefill:
            assert start == one.computed < end <= len(one.tokens)
            assert end <= len(one.pages) * SIZE
        if len(plan.prefill) > 1:
            assert sum(end - start for _, start, end in plan.prefill) <= budget
            assert all(end == len(one.tokens) for one, _, end in plan.prefill), "cut only if read alone"
        assert plan.prefill or plan.decode or not scheduler.active or waiting
        play(scheduler, plan)
        step += 1
        assert step < 2000, "somebody waits for ever"
    assert pool.available == pages
