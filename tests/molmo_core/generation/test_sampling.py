"""Choosing tokens from logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.generation.sampling import SamplingConfig, filter_logits, next_token, seeded


def kept(logits: torch.Tensor, **settings) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in filter_logits(logits, **settings)]


def test_top_k_keeps_the_most_probable_of_each_row():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 0.0, 1.0, 0.5]])
    assert kept(logits, top_k=2) == [[1, 3], [0, 2]]
    assert kept(logits, top_k=None) == kept(logits, top_k=0) == kept(logits, top_k=9) == [[0, 1, 2, 3]] * 2


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert kept(logits, top_p=0.4) == [[0]]
    assert kept(logits, top_p=0.6) == [[0, 1]]
    assert kept(logits, top_p=0.9) == [[0, 1, 2]]
    assert kept(logits, top_p=0.01) == [[0]], "the most probable token always stays"


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(logits, top_k=2, top_p=0.5) == [[0]]  # 0.4 / 0.7 > 0.5


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30), st.floats(0.01, 1.0), st.integers(1, 40))
def test_filters_keep_probable_tokens_and_their_logits(values, top_p, top_k):
    logits = torch.tensor([values])
    filtered = filter_logits(logits, top_p, top_k)
    inside = filtered.isfinite()
    assert inside.any()
    assert torch.equal(filtered[inside], logits[inside])
    if not inside.all():
        assert logits[inside].min() >= logits[~inside].max()


def test_frequencies_follow_the_tempered_distribution():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    config = SamplingConfig(do_sample=True, temperature=0.5)
    tokens = next_token(logits, config, torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens, minlength=3) / len(tokens)
    assert torch.allclose(shares, torch.tensor([0.36, 0.09, 0.01]) / 0.46, atol=0.02)


def test_greedy_without_sampling_and_at_temperature_zero():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert next_token(logits, SamplingConfig(temperature=9.0)).tolist() == [1]
    assert next_token(logits, SamplingConfig(do_sample=True, temperature=0)).tolist() == [1]


FLOATS = st.floats(-1e4, 1e4, width=32) | st.just(-float("inf"))


@given(
    st.lists(FLOATS, min_size=1, max_size=30).filter(lambda values: max(values) > -float("inf")),
    st.floats(0, 1e300),
    st.floats(0, 1, exclude_min=True),
    st.none() | st.integers(0, 2**80),
)
def test_every_permitted_setting_draws_a_permitted_token(values, temperature, top_p, top_k):
    logits = torch.tensor([values])
    token = int(next_token(logits, SamplingConfig(True, temperature, top_p, top_k), torch.Generator().manual_seed(0)))
    assert values[token] > -float("inf")
    if temperature < 1e-5 or (top_k == 1 and values.count(max(values)) == 1):
        assert values[token] == max(values)


SEEDS = [*range(5), 2**31, *(2**k + d for k in (32, 33, 40, 62) for d in (-1, 0, 1)), 2**63 - 1, -1, -2, -(2**32), -(2**63), 2**64 - 7]


def test_seeds_that_differ_draw_differently():
    """On CPUs torch itself takes the lower 32 bits of a seed only."""
    drawn = {seed: tuple(torch.randint(2**40, (4,), generator=seeded("cpu", seed)).tolist()) for seed in SEEDS}
    assert len(set(drawn.values())) == len(set(SEEDS))
    assert drawn == {seed: tuple(torch.randint(2**40, (4,), generator=seeded("cpu", seed)).tolist()) for seed in SEEDS}
    small = torch.Generator().manual_seed(3)
    assert drawn[3] == tuple(torch.randint(2**40, (4,), generator=small).tolist()), "small seeds are torch's own"


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 63))
def test_every_bit_of_a_seed_counts(seed, bit):
    other = (seed ^ 1 << bit) if bit < 63 else -seed - 1
    assert seeded("cpu", seed).initial_seed() != seeded("cpu", other).initial_seed()


def test_without_a_seed_nothing_repeats():
    assert seeded("cpu", None).initial_seed() != seeded("cpu", None).initial_seed()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_k": -1},
    ],
)
def test_impossible_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplingConfig(do_sample=True, **settings)
