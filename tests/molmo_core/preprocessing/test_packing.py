"""The packer (nothing lost, budgets kept, resumable, as full as can be) and joining of examples."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks.packing
from molmo_core.preprocessing.packing import Packer, best_fill, pack, unpack
from molmo_core.tokens import PACK_STRIDE

lengths = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), min_size=1, max_size=120)
buffers = st.integers(1, 12)


def run(packer: Packer, stream: list[tuple[int, int]], start: int = 0) -> list[list[int]]:
    return [p for i, (t, c) in enumerate(stream) if i >= start and (p := packer.add(i, t, c))]


@settings(max_examples=100, deadline=None)
@given(lengths, buffers, st.integers(0, 5))
def test_nothing_is_lost_and_budgets_are_kept(stream: list[tuple[int, int]], buffer_size: int, max_passed: int) -> None:
    packer: Packer[int] = Packer(100, 10, buffer_size, max_passed)
    packs = run(packer, stream)
    assert len(packer.buffer) < buffer_size
    packs += packer.flush()
    assert sorted(itertools.chain(*packs)) == list(range(len(stream)))
    for p in packs:
        assert p == sorted(p)
        assert sum(stream[i][0] for i in p) <= 100
        assert sum(stream[i][1] for i in p) <= 10
    assert packer.buffer == []


@settings(max_examples=60, deadline=None)
@given(lengths, buffers, st.data())
def test_resuming_equals_never_stopping(stream: list[tuple[int, int]], buffer_size: int, data: st.DataObject) -> None:
    whole = run(Packer(100, 10, buffer_size), stream)
    stop = data.draw(st.integers(0, len(stream)))
    first: Packer[int] = Packer(100, 10, buffer_size)
    before = [p for i in range(stop) if (p := first.add(i, *stream[i]))]
    second: Packer[int] = Packer(100, 10, buffer_size)
    second.buffer = list(first.buffer)
    assert before + run(second, stream, stop) == whole


def test_resuming_in_the_middle_of_a_long_stream() -> None:
    """Long enough that old examples are preferred and forced."""
    tokens, crops = benchmarks.packing.video(np.random.default_rng(4), 500)
    stream = [(int(t), int(c)) for t, c in zip(tokens, crops) if t <= 4096 and c <= 48]
    whole = run(Packer(4096, 48, max_passed=40), stream)
    assert len(whole) > 100
    for stop in (60, 200, len(stream) - 3):
        first: Packer[int] = Packer(4096, 48, max_passed=40)
        before = [p for i in range(stop) if (p := first.add(i, *stream[i]))]
        second: Packer[int] = Packer(4096, 48, max_passed=40)
        second.buffer = list(first.buffer)
        assert before + run(second, stream, stop) == whole


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), max_size=9), st.integers(0, 40), st.integers(0, 12))
def test_best_fill_is_the_best(sizes: list[tuple[int, int]], budget: int, other: int) -> None:
    chosen = best_fill(sizes, budget, other)
    used, spent = (sum(sizes[i][k] for i in chosen) for k in (0, 1))
    assert chosen == sorted(set(chosen))
    assert used <= budget
    assert spent <= other
    options = [
        (sum(sizes[i][0] for i in c), sum(sizes[i][1] for i in c))
        for n in range(len(sizes) + 1)
        for c in itertools.combinations(range(len(sizes)), n)
    ]
    most = max(u for u, s in options if u <= budget and s <= other)
    assert used == most
    if used < budget:  # a full choice may be found before the cheapest one
        assert spent == min(s for u, s in options if u == most and s <= other)


def test_nothing_starves() -> None:
    """An example that never fits best is taken after max_passed packs."""
    packer: Packer[str] = Packer(100, 10, buffer_size=4, max_passed=7)
    for i in range(3):
        packer.add(f"even {i}", 50, 0)
    packs = [packer.add("odd", 33, 0)]
    while packs[-1] is None or "odd" not in packs[-1]:
        packs.append(packer.add("even", 50, 0))
    assert sum(p is not None for p in packs) == 8


@pytest.mark.parametrize(("max_tokens", "max_crops"), [(16384, 128), (4096, 48)])
def test_occupancy(max_tokens: int, max_crops: int) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(400, 1400, 600)
    crops = rng.integers(2, 10, 600)
    packer: Packer[int] = Packer(max_tokens, max_crops)
    packs = [p for i in range(600) if (p := packer.add(i, int(tokens[i]), int(crops[i])))]
    assert np.mean([tokens[p].sum() for p in packs]) / max_tokens > 0.97


@pytest.mark.parametrize("stream", ["captions", "vqa", "video"])
def test_as_full_as_the_published_algorithm(stream: str) -> None:
    """On a short stream; benchmarks/packing.py measures long ones."""
    budget = (16384, 128)
    tokens, crops = getattr(benchmarks.packing, stream)(np.random.default_rng(1), 300)
    packs = []
    for packer in (benchmarks.packing.KnapsackPacker(*budget, 48), Packer(*budget, 48)):
        made = [p for i, (t, c) in enumerate(zip(tokens.tolist(), crops.tolist())) if (p := packer.add(i, t, c))]
        packs.append(made + packer.flush())
    published, ours = packs
    assert sorted(itertools.chain(*published)) == sorted(itertools.chain(*ours))
    assert len(ours) <= len(published)


def test_scarce_crops_are_filled_first() -> None:
    packer: Packer[int] = Packer(1000, 16, buffer_size=12)
    sizes = [(100, 7), (101, 9), (102, 5), (103, 4), (200, 3), (90, 0), (80, 0), (70, 8), (60, 8), (110, 6), (120, 10), (130, 11)]
    packs = [p for i, s in enumerate(sizes) if (p := packer.add(i, *s))]
    assert len(packs) == 1
    assert sum(sizes[i][1] for i in packs[0]) == 16
    assert {5, 6} <= set(packs[0])  # and what needs no crops fills the rest


@pytest.mark.parametrize(("tokens", "crops"), [(101, 0), (0, 0), (5, 11), (5, -1)])
def test_what_cannot_be_packed_is_named(tokens: int, crops: int) -> None:
    with pytest.raises(ValueError, match=rf"example 'x' has {tokens} tokens and {crops} crops"):
        Packer(100, 10).add("x", tokens, crops)


def test_budgets_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="max_tokens=0"):
        Packer(0, 10)


# Joining


def example(rng: np.random.Generator, tokens: int, crops: int, width: int, tree: bool, masks: bool = False) -> dict[str, Any]:
    result: dict[str, Any] = {
        "input_ids": rng.integers(0, 400, tokens),
        "labels": rng.integers(-1, 400, tokens),
        "loss_masks": rng.random(tokens, dtype=np.float32),
        "position_ids": np.arange(tokens),
        "metadata": {"number": int(rng.integers(100))},
    }
    if tree:
        result["subsegment_ids"] = np.where(np.arange(tokens) < 2, 10000, 1)
    if crops:
        result["images"] = rng.integers(0, 256, (crops, 4, 12), dtype=np.uint8)
        result["pooled_patches_idx"] = rng.integers(-1, crops * 4, (3, width))
        if masks:
            result["image_masks"] = rng.random((crops, 4), dtype=np.float32)
    return result


kinds = st.tuples(st.integers(1, 6), st.integers(0, 3), st.integers(1, 3), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(kinds, min_size=1, max_size=5), st.booleans())
def test_unpack_gives_the_examples_back(shapes: list[tuple[int, int, int, bool]], masks: bool) -> None:
    rng = np.random.default_rng(1)
    examples = [example(rng, *shape, masks) for shape in shapes]
    packed = pack(examples)
    assert len(packed["input_ids"]) == sum(s[0] for s in shapes)
    again = unpack(packed)
    assert len(again) == len(examples)
    for new, old in zip(again, examples):
        assert new.keys() == old.keys()
        for key in old:
            if key == "metadata":
                assert new[key] == old[key]
            else:
                np.testing.assert_array_equal(new[key], old[key])
                assert new[key].dtype == old[key].dtype


def test_pack() -> None:
    rng = np.random.default_rng(2)
    text, wide, tree = example(rng, 3, 0, 0, False), example(rng, 4, 2, 3, False), example(rng, 5, 1, 2, True)
    wide["pooled_patches_idx"] = np.array([[0, 7, -1], [-1, -1, 3]])
    tree["pooled_patches_idx"] = np.array([[0, -1]])
    packed = pack([text, wide, tree])
    np.testing.assert_array_equal(packed["pooled_patches_idx"], [[0, 7, -1], [-1, -1, 3], [8, -1, -1]])
    np.testing.assert_array_equal(packed["subsegment_ids"] // PACK_STRIDE, [0] * 3 + [1] * 4 + [2] * 5)
    np.testing.assert_array_equal(packed["subsegment_ids"][-5:] % PACK_STRIDE, tree["subsegment_ids"])
    np.testing.assert_array_equal(packed["position_ids"], [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(packed["images"], np.concatenate([wide["images"], tree["images"]]))


def test_what_does_not_fit_together() -> None:
    rng = np.random.default_rng(3)
    one, other = example(rng, 3, 1, 2, False, masks=True), example(rng, 3, 1, 2, False)
    with pytest.raises(ValueError, match="example 1 of the pack has no image_masks"):
        pack([one, other])
    with pytest.raises(ValueError, match="low_to_high"):
        pack([{**one, "low_to_high": np.zeros((2, 2))}])
    with pytest.raises(ValueError, match="images of the pack's examples differ"):
        pack([other, {**other, "images": np.zeros((1, 4, 12), np.float32)}])
    with pytest.raises(ValueError, match="no labels"):
        pack([one, {k: v for k, v in one.items() if k != "labels"}])
    with pytest.raises(ValueError, match="at least one"):
        pack([])
