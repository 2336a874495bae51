"""Pages: references, sharing by key, what is forgotten first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.generation.engine.pages import PagePool, page_keys


def test_take_and_release():
    pool = PagePool(4, 16)
    assert [pool.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    pages = pool.take(3)
    assert 0 not in pages
    assert len(set(pages)) == 3
    assert pool.available == 1
    with pytest.raises(ValueError, match="2 pages wanted, 1 available"):
        pool.take(2)
    pool.release(pages)
    assert pool.available == 4


def test_what_is_published_is_found_until_its_page_is_needed():
    pool = PagePool(3, 16)
    pages = pool.take(2)
    pool.publish(pages[0], b"a")
    pool.publish(pages[1], b"b")
    assert pool.find([b"a", b"b", b"c"]) == pages
    assert pool.find([b"b"]) == pages[1:]
    assert pool.find([b"c", b"a"]) == []
    pool.release(pages)
    assert pool.available == 3
    assert pool.unused(pages) == 2
    pool.share(pool.find([b"a"]))
    assert pool.available == 2
    pool.take(2)  # the free one, and what held "b"
    assert pool.find([b"a", b"b"]) == pages[:1]


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning():
    pool = PagePool(3, 16)
    pages = pool.take(3)
    for page, key in zip(pages, (b"a", b"b", b"c")):
        pool.publish(page, key)
    pool.release(pages)
    pool.take(1)
    assert len(pool.find([b"a", b"b", b"c"])) == 2


def test_a_key_has_one_page():
    pool = PagePool(2, 16)
    first, second = pool.take(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.release([second])
    assert pool.find([b"a"]) == [first]
    assert pool.available == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "release", "share"]), st.integers(0, 5)), max_size=60))
def test_no_page_is_lost_or_given_twice(actions):
    pool, held, next_key = PagePool(6, 16), [], 0
    for action, number in actions:
        if action == "take" and number <= pool.available:
            pages = pool.take(number)
            for page in pages[: number // 2]:
                pool.publish(page, bytes([next_key % 7]))
                next_key += 1
            held.append(pages)
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif action == "share":
            found = pool.find([bytes([number])])
            pool.share(found)
            held.append(found)
        used = {page for pages in held for page in pages}
        assert pool.available == 6 - len(used)


def keys(tokens, horizon=None, media=b"", first=10**9, size=4):
    ids = np.array(tokens)
    return page_keys(ids, np.arange(len(ids)), None if horizon is None else np.array(horizon), media, first, size)


def test_keys_of_causal_prompts():
    a, b = keys([1, 2, 3, 4, 5, 6, 7, 8, 9]), keys([1, 2, 3, 4, 5, 6, 7, 0, 9])
    assert len(a) == 2
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert keys([1, 2, 3]) == []


def test_keys_know_the_media_from_their_first_token_on():
    a, b = (keys([1, 2, 3, 4, 5, 6, 7, 8], media=media, first=5) for media in (b"x", b"y"))
    assert a[0] == b[0]
    assert a[1] != b[1]


def test_keys_know_what_tokens_see_ahead():
    """Tokens 2 to 5 see each other: the first page depends on token 5, which is in the second."""
    horizon = [0, 1, 5, 5, 5, 5, 6, 7]
    a, b = keys([1, 2, 3, 4, 5, 6, 7, 8], horizon), keys([1, 2, 3, 4, 5, 0, 7, 8], horizon)
    assert a[0] != b[0]
    c = keys([1, 2, 3, 4, 5, 6, 7, 0], horizon)
    assert a[0] == c[0]
    assert a[1] != c[1]
    assert len(set(a)) == 2


def test_positions_are_part_of_the_key():
    ids = np.arange(4)
    assert page_keys(ids, ids, None, b"", 9, 4) != page_keys(ids, ids + 1, None, b"", 9, 4)
