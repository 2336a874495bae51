"""The engine's points equal those of `generate`, token by token, whoever else is served."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from molmo_core.generation.engine import point_slots
from molmo_core.generation.engine.decoding import GraphDecoder
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.paged import PagedCache
from molmo_core.generation.engine.requests import Grammar, Request, SamplingParams, Token
from molmo_core.models.molmo_point import MolmoPoint
from tests.molmo_core.models.golden_point import cases, inputs_here, load_point_model

NEW = 40


@pytest.fixture(scope="module", params=["a", "c"])
def model(golden: Path, request: pytest.FixtureRequest) -> MolmoPoint:
    model = load_point_model(golden / "molmo-point" / request.param)
    model.folder = golden / "molmo-point" / request.param
    return model


def prompts(model: MolmoPoint) -> list[dict[str, Any]]:
    """An image, several images, a video, and text."""
    rows = [{k: v[0].numpy() for k, v in inputs_here(p).items()} for p in cases(load_file(model.folder / "prompt.safetensors")).values()]
    return [*rows, {"input_ids": rows[0]["input_ids"][-20:]}]


def engine(model: MolmoPoint, pages: int = 200, ahead: bool = False, **limits: Any) -> Engine:
    """`ahead`: as on a GPU, but without graphs."""
    cache = pages * PagedCache.page_bytes(model.config.llm, 16, torch.float32)
    engine = Engine(model, EngineLimits(page_size=16, cache_bytes=cache, **limits))
    if ahead:
        engine.decoder = GraphDecoder(model, engine.runner.cache, engine.limits.max_running, 60, engine.runner.points)
    return engine


def run(engine: Engine, requests: list[Request]) -> dict[Request, list[Token]]:
    """All answers."""
    answers: dict[Request, list[Token]] = {request: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.active:
        for request, event in engine.step():
            if isinstance(event, Token):
                answers[request].append(event)
            assert not hasattr(event, "error"), event
    return answers


def expected(model: MolmoPoint, example: dict[str, Any]) -> tuple[list[int], list[int]]:
    output = model.generate(**example, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=-7)
    return output.token_ids[0].tolist(), output.internal["point_places"][0].tolist()


@pytest.mark.parametrize("ahead", [False, True], ids=["plain", "ahead"])
@pytest.mark.parametrize("limits", [{}, {"max_running": 2}, {"prefill_tokens": 50}, {"pages": 14}], ids=str)
def test_engine_equals_generate(model: MolmoPoint, limits: dict[str, int], ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, in turns, with prompts in pieces, and with answers that are preempted and computed again."""
    monkeypatch.setattr(point_slots, "TOKENS", 5)  # room for image tokens grows
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    requests = [Request(example, params) for example in prompts(model)]
    served = engine(model, ahead=ahead, **limits)
    answers = run(served, requests)
    if "pages" in limits:
        assert served.stats().preemptions > 0
    for request, tokens in answers.items():
        ids, places = expected(model, request.example)
        assert [token.id for token in tokens] == ids
        assert [token.place for token in tokens][: NEW - 1] == places
        if "images" not in request.example:
            assert not set(ids) & set(model.tokenizer.point_token_ids)
            continue
        assert max(places) >= 0
    points = served.runner.points
    assert not points._answers
    assert points.slots.version > 0
    assert points.slots._free.all()


def test_drawn_answers_do_not_depend_on_the_others(model: MolmoPoint) -> None:
    """Text is drawn, points are not; whoever wants log-probabilities keeps all from running ahead."""
    asked = [
        Request(example, SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.7 * (i % 3), seed=i, logprobs=1 if i == 5 else None))
        for i, example in enumerate(prompts(model) * 2)
    ]
    together = run(engine(model, ahead=True, max_running=3), asked)
    for request in asked:
        (alone,) = run(engine(model), [Request(request.example, request.params)]).values()
        assert [(t.id, t.place) for t in together[request]] == [(t.id, t.place) for t in alone]
    assert sum(token.place >= 0 for tokens in together.values() for token in tokens) > 20


def test_a_step_waits_for_nothing_of_the_points(model: MolmoPoint) -> None:
    """What a graph captures reads no number, and its shapes depend on the size of the batch only: it runs on tensors without numbers."""
    width = model.config.llm.d_model
    with FakeTensorMode(allow_non_fake_inputs=True):
        slots = point_slots.PointSlots(model, 4)
        at = torch.zeros(3, dtype=torch.int64)
        assert slots.feed(at, at).shape == (3, width)
        slots.observe(at, torch.zeros(3, width), torch.zeros(3, 500))
        assert slots.places(at, at).shape == (3,)
        with pytest.raises(DataDependentOutputException):
            at.sum().item()


def test_a_grammar_beside_points(model: MolmoPoint) -> None:
    """Tokens of points are no text, so no grammar allows them; whoever has none points on."""
    example = prompts(model)[0]
    held = Request(example, SamplingParams(max_tokens=NEW, grammar=Grammar("regex", "[a-c]{3,9}")))
    free = Request(example, SamplingParams(max_tokens=NEW, ignore_eos=True))
    answers = run(engine(model), [held, free])
    text = model.tokenizer.decode([token.id for token in answers[held]]).strip()
    assert re.fullmatch("[a-c]{3,9}", text)
    assert [token.id for token in answers[free]] == expected(model, example)[0]


@pytest.mark.parametrize("limits", [{}, {"prefill_tokens": 50}], ids=str)
def test_turns_with_points_before(model: MolmoPoint, limits: dict[str, int]) -> None:
    """Answers that pointed are read with their points; the next one may point anew."""
    preprocess, pixels = model.config.build_preprocessor(for_inference=True), np.zeros((60, 80, 3), np.uint8)
    written = '<points coords="1 1 100 100 2 900 800">dogs</points>'
    rows = [preprocess({"image": pixels, "messages": ["Where?", text, "And now?"]}) for text in (written, "Nowhere.")]
    assert len(rows[0]["point_target_ids"]) >= 2
    requests = [Request(row, SamplingParams(max_tokens=NEW, ignore_eos=True)) for row in rows]
    for request, tokens in run(engine(model, **limits), requests).items():
        ids, places = expected(model, request.example)
        assert [token.id for token in tokens] == ids
        assert [token.place for token in tokens][: NEW - 1] == places


@pytest.mark.parametrize("begun", [1, 2, 3, 4, 9])
def test_an_answer_goes_on_elsewhere(model: MolmoPoint, begun: int) -> None:
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    for example in prompts(model)[:3]:
        (tokens,) = run(engine(model), [Request(example, params)]).values()
        first = tokens[:begun]
        rest = Request(example, params, tuple(t.id for t in first), tuple(t.place for t in first))
        (others,) = run(engine(model), [rest]).values()
        assert [(t.id, t.place) for t in others] == [(t.id, t.place) for t in tokens[begun:]]
