"""Choosing tokens from logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molmo_core.generation.sampling import SamplingConfig, filter_logits, next_token


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


@pytest.mark.parametrize("settings", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplingConfig(do_sample=True, **settings)
