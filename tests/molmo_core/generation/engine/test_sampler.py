"""Choosing tokens: distributions as they are defined, and each row for itself."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.generation.engine.requests import SamplingParams
from molmo_core.generation.engine.rows import Row
from molmo_core.generation.engine.sampler import Sampler, Scores, logprobs_of
from molmo_core.generation.sampling import filter_logits


def row(seed=0, prompt=(), answer=(), ends=(0,), slot=0, **params) -> Row:
    return Row(SamplingParams(**params), [*prompt, *answer], len(prompt), seed, ends, slot=slot)


class Choice(NamedTuple):
    tokens: torch.Tensor
    finite: torch.Tensor


def choose(logits: torch.Tensor, rows: list[Row]) -> Choice:
    """The next tokens of these rows, and whether they had numbers; edits the logits."""
    sampler, scores = Sampler(len(rows), torch.device("cpu")), Scores.of(logits)
    batch = sampler.batch([row._replace(slot=i, pages=[]) for i, row in enumerate(rows)])
    return Choice(sampler.choose(scores, batch), scores.finite)


def draws(logits, n=4000, **params) -> torch.Tensor:
    """Shares of the tokens over many seeds."""
    rows = [row(seed=seed, **params) for seed in range(n)]
    return torch.bincount(choose(logits.expand(n, -1).clone(), rows).tokens, minlength=len(logits)) / n


def test_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert choose(logits, [row(), row()]).tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.8}, {"temperature": 0.5}, {"temperature": 2.0}]
)
def test_shares_are_the_probabilities(params):
    torch.manual_seed(0)
    logits = torch.randn(8)
    params = {"temperature": 1.0} | params
    expected = filter_logits(logits[None] / params["temperature"], params.get("top_p", 1.0), params.get("top_k")).softmax(-1)[0]
    shares = draws(logits, **params)
    assert torch.equal(shares > 0, expected > 0) or (expected[(shares == 0) & (expected > 0)] < 0.005).all()
    assert (shares - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_min_p():
    logits = torch.tensor([0.6, 0.3, 0.07, 0.03]).log()
    assert (draws(logits, temperature=1.0, min_p=0.2) > 0).tolist() == [True, True, False, False]


def test_rows_do_not_depend_on_each_other():
    torch.manual_seed(1)
    logits = torch.randn(6, 50)
    rows = [
        row(seed=7, temperature=1.0), row(temperature=0.0), row(seed=2**40 + 7, temperature=1.5, top_k=5), row(seed=3,
        temperature=0.3, min_p=0.1),
        row(seed=4, temperature=1.0, top_p=0.5), row(seed=5, temperature=1.0, frequency_penalty=1.0, answer=(1, 1, 2)),
    ]  # fmt: skip
    together = choose(logits.clone(), rows).tokens
    for i, one in enumerate(rows):
        assert choose(logits[i : i + 1].clone(), [one]).tokens[0] == together[i]


@pytest.mark.parametrize("step", [2**32, 2**33, 2**62, 1])
def test_seeds_that_differ_draw_differently(step):
    logits = torch.zeros(1, 1000)
    tokens = [
        [choose(logits.clone(), [row(seed=seed, answer=[0] * k, temperature=1.0)]).tokens.item() for k in range(8)]
        for seed in (5, 5, 5 + step)
    ]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(set(tokens[0])) > 1, "each position draws anew"


def test_penalties_and_bias():
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5]])
    edited = logits.clone()
    choose(
        edited,
        [
            row(
                prompt=(0,),
                answer=(1, 1),
                repetition_penalty=2.0,
                presence_penalty=0.25,
                frequency_penalty=0.5,
                logit_bias={3: 9.0, 99: 1.0},
            )
        ],
    )
    assert edited.tolist() == [[0.5, -2.0 - 0.25 - 1.0, 2.0, 9.5]]


def test_penalties_count_what_was_chosen():
    """Step by step on the device, whoever has the slots; the tokens are not told to the sampler again."""
    torch.manual_seed(0)
    steps = torch.randn(12, 3, 20)
    params = [{"frequency_penalty": 0.7, "presence_penalty": 0.2}, {}, {"repetition_penalty": 1.5, "temperature": 1.0}]
    rows = [row(seed=i, prompt=(1, 2), slot=2 - i, **p) for i, p in enumerate(params)]
    rows = [one._replace(pages=[]) for one in rows]
    sampler = Sampler(3, torch.device("cpu"))
    batch = sampler.batch(rows)
    for n, logits in enumerate(steps):
        exact = choose(logits.clone(), rows).tokens.tolist()
        if n == 6:  # somebody else joined or left
            batch = sampler.batch(rows)
        assert sampler.choose(Scores.of(logits.clone()), batch).tolist() == exact
        for one, token in zip(rows, exact):
            one.tokens.append(token)
    other = row(prompt=(5,), slot=2, frequency_penalty=5.0)._replace(pages=[])
    logits = torch.zeros(1, 20)
    logits[0, rows[0].tokens[-1]] = 1
    assert sampler.choose(Scores.of(logits), sampler.batch([other])).tolist() == [rows[0].tokens[-1]], "the slot is another's"


def test_minimum_length():
    logits = torch.tensor([[5.0, 1.0, 4.0]])
    assert choose(logits.clone(), [row(ends=(0, 2), min_tokens=2, answer=(1,))]).tokens.item() == 1
    assert choose(logits.clone(), [row(ends=(0, 2), min_tokens=2, answer=(1, 1))]).tokens.item() == 0
    assert choose(logits.clone(), [row(ends=(), min_tokens=2, answer=(1,))]).tokens.item() == 0, "no token ends it (ignore_eos)"


@pytest.mark.parametrize("params", [{"top_p": 1e-300}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-300}])
def test_settings_that_leave_one_token(params):
    torch.manual_seed(0)
    logits = torch.randn(20, 30)
    rows = [row(seed=seed, **{"temperature": 1.0} | params) for seed in range(20)]
    assert torch.equal(choose(logits.clone(), rows).tokens, logits.argmax(-1))


EDGES = {
    "temperature": [0.0, 1e-300, 1e-40, 1e-6, 1e-5, 1.0, 100.0, 1e300], "top_p": [1e-300, 1e-9, 0.5, 1.0], "top_k": [0, 1, 2**31, 2**62],
    "min_p": [0.0, 1e-300, 1.0], "repetition_penalty": [1e-30, 1.0, 1e30], "presence_penalty": [-100.0, 100.0],
    "frequency_penalty": [-100.0, 100.0],
    "logit_bias": [{}, {1: -1e38}, {0: 1e38, 1: 1e38}],
}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in EDGES.items()}), st.integers(0, 2**64 - 1))
def test_no_setting_harms_a_neighbour(params, seed):
    torch.manual_seed(0)
    logits = torch.randn(2, 20)
    neighbour = row(seed=1, temperature=1.0)
    alone = choose(logits[1:].clone(), [neighbour]).tokens[0]
    both = choose(logits.clone(), [row(seed=seed, prompt=(1, 2), answer=(3,), **params), neighbour])
    assert both.tokens[1] == alone
    assert bool(both.finite[1])
    assert 0 <= both.tokens[0] < 20


def test_rows_without_numbers_are_told():
    logits = torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    assert choose(logits, [row(), row()]).finite.tolist() == [True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0}, {"top_p": math.nan},
        {"top_k": -1}, {"min_p": 2},
        {"max_tokens": 0}, {"min_tokens": 300}, {"repetition_penalty": 0}, {"presence_penalty": math.nan},
        {"logit_bias": {1: math.inf}}, {"logprobs": 21},
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_logprobs():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    first, second = logprobs_of(logits, torch.tensor([1, 0]), [2, None])
    expected = logits[0].log_softmax(-1)
    assert first.token == pytest.approx(expected[1].item())
    assert first.top == [(2, pytest.approx(expected[2].item())), (1, pytest.approx(expected[1].item()))]
    assert second is None
