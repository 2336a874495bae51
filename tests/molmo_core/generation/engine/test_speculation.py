"""Speculation by prompt lookup: whatever is proposed, the answers are those of `generate`."""

import numpy as np
import pytest

from molmo_core.generation.engine.decoding import GraphDecoder
from molmo_core.generation.engine.engine import Engine
from molmo_core.generation.engine.prompt_lookup import PromptLookup
from molmo_core.generation.engine.requests import End, Request, SamplingParams, Token
from tests.molmo_core.generation.engine.prompts import FAMILY, family_model, family_prompts
from tests.molmo_core.generation.engine.test_engine import alone, limits, pages, run, tokens_of
from tests.molmo_core.models.golden_point import load_point_model


def told(answers: dict[tuple[int, ...], list[int]], mistakes: float):
    """In place of `PromptLookup.propose`: the real answers by their prompts, with a share of mistakes."""
    rng, real = np.random.RandomState(0), PromptLookup.propose

    def propose(self, tokens, most):
        for prompt, answer in answers.items():
            begun = len(tokens) - len(prompt)
            if begun > 0 and tuple(tokens[: len(prompt)]) == prompt and tokens[len(prompt) :] == answer[:begun]:
                right = answer[begun : begun + rng.randint(1, most + 1)]
                return [token ^ 1 if rng.rand() < mistakes else token for token in right]
        return real(self, tokens, most)

    return propose


def engine_of(model, setting, graphs: bool) -> Engine:
    engine = Engine(model, setting)
    if graphs:  # as on a GPU, but without graphs
        engine.decoder = GraphDecoder(model, engine.runner.cache, engine.speculation.rows, 100)
    return engine


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", ["plenty", "preempted", "chunks", "graphs", "one at a time"])
def test_answers_equal_generate(name, kind, golden, monkeypatch):
    model = family_model(name, golden)
    examples = family_prompts(name, model, golden)
    rng = np.random.RandomState(0)
    most = 24
    known = [alone(model, example, most) for example in examples]
    answers = {tuple(example["input_ids"].tolist()): answer for example, answer in zip(examples, known)}
    monkeypatch.setattr(PromptLookup, "propose", told(answers, 0.2))
    longest = max(len(example["input_ids"]) for example in examples)
    setting = {
        "plenty": limits(page_size=16, speculate=3),
        "preempted": pages(model, (longest + most) // 4 + 3, page_size=4, speculate=5),
        "chunks": limits(prefill_tokens=24, page_size=8, speculate=4),
        "graphs": limits(page_size=16, max_running=5, speculate=2),
        "one at a time": limits(page_size=16, max_running=1, speculate=6),
    }[kind]
    engine = engine_of(model, setting, kind == "graphs")
    order = [*range(len(examples)), *rng.choice(len(examples), 6)]
    asked = [Request(examples[i], SamplingParams(max_tokens=int(rng.randint(most // 2, most)))) for i in order]
    events = run(engine, [(int(rng.randint(0, 15)), request) for request in asked])
    for i, request in zip(order, asked):
        assert tokens_of(events[request]) == known[i][: request.params.max_tokens], f"{name} prompt {i}"
    assert engine.scheduler.pool.available == engine.scheduler.pool.total, "all pages are free again"
    if any(len(answer) > 4 for answer in known):
        assert 0 < engine.speculation.accepted < engine.speculation.proposed


@pytest.fixture(scope="module")
def prompts(tiny_model):
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    return [preprocess({"messages": [text]}) for text in ("what shape is this?", "why", "say it again, and again", "which color is it?")]


@pytest.mark.parametrize("graphs", [False, True])
def test_beside_requests_that_are_not_plain(tiny_model, prompts, graphs, monkeypatch):
    """Draws, penalties, biases, log-probabilities and grammars go on token by token in the same steps, with the same results."""
    answers = {tuple(prompt["input_ids"].tolist()): alone(tiny_model, prompt, 30) for prompt in prompts}
    kinds = [
        {}, {"temperature": 1.0, "seed": 1}, {"frequency_penalty": 0.7}, {"logprobs": 2}, {"min_tokens": 12}, {"logit_bias": {5: 1.0}},
        {"stop_token_ids": (next(iter(answers.values()))[5],)},
    ]  # fmt: skip
    results = []
    for speculate in (0, 3):
        if speculate:
            monkeypatch.setattr(PromptLookup, "propose", told(answers, 0.2))
        engine = Engine(tiny_model, limits(page_size=16, max_running=20, speculate=speculate))
        if graphs:
            engine.decoder = GraphDecoder(tiny_model, engine.runner.cache, 20, 100)
        asked = [
            Request(prompts[i % 4], SamplingParams(**{"max_tokens": 20, "ignore_eos": True} | kind)) for i, kind in enumerate(kinds * 4)
        ]
        events = run(engine, [(i // 3, request) for i, request in enumerate(asked)])
        results.append([[e.id if isinstance(e, Token) else e for e in events[request]] for request in asked])
        assert all(isinstance(given[-1], End) for given in results[-1])
    assert results[0] == results[1]
    assert engine.speculation.accepted > 0


def test_only_plain_requests_are_speculated_for():
    assert SamplingParams(stop_token_ids=(3,), ignore_eos=True).plain
    for kind in ({"temperature": 0.5}, {"presence_penalty": 1.0}, {"logit_bias": {1: 1.0}}, {"min_tokens": 1}, {"logprobs": 0}):
        assert not SamplingParams(**kind).plain


def test_lookup_takes_the_last_and_longest():
    lookup = PromptLookup()
    tokens = [1, 2, 3, 4, 5, 9, 3, 4, 6, 7, 3, 4]
    assert lookup.propose(tokens, 3) == [6, 7, 3], "the last place of the same two"
    assert lookup.propose([*tokens, 5], 3) == [9, 3, 4], "of the two last: once"
    assert lookup.propose([*tokens, 5, 8], 3) == [], "never seen"
    assert PromptLookup().propose([1, 2, 3, 4, 7, 2, 3, 4, 8, 1, 2, 3, 4], 2) == [7, 2], "four of the same before the last three"
    assert PromptLookup().propose([5, 6, 7, 5, 6, 7, 5, 6], 5) == [7, 5, 6, 7, 5], "a loop goes on"
    assert PromptLookup().propose([1], 4) == []


def test_every_accepted_token_is_a_step_less(tiny_model, prompts):
    steps, answers = [], []
    for speculate in (0, 4):
        engine = Engine(tiny_model, limits(speculate=speculate))
        engine.add(Request(prompts[0], SamplingParams(max_tokens=300, ignore_eos=True)))
        tokens, count = [], 0
        while engine.active:
            tokens += [event.id for _, event in engine.step() if isinstance(event, Token)]
            count += 1
        steps.append(count)
        answers.append(tokens)
    assert answers[0] == answers[1]
    assert steps[0] - steps[1] == engine.speculation.accepted > 0


def test_models_that_choose_points_are_refused(golden):
    model = load_point_model(golden / "molmo-point/a")
    with pytest.raises(ValueError, match="not for models that choose points"):
        Engine(model, limits(speculate=2))
