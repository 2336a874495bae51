"""The engine's points equal those of `generate`, token by token, whoever else is served."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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


def engine(model: MolmoPoint, pages: int = 200, **limits: Any) -> Engine:
    cache = pages * PagedCache.page_bytes(model.config.llm, 16, torch.float32)
    return Engine(model, EngineLimits(page_size=16, cache_bytes=cache, **limits))


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


@pytest.mark.parametrize("limits", [{}, {"max_running": 2}, {"prefill_tokens": 50}, {"pages": 14}], ids=str)
def test_engine_equals_generate(model: MolmoPoint, limits: dict[str, int]) -> None:
    """Together, in turns, with prompts in pieces, and with answers that are preempted and computed again."""
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    requests = [Request(example, params) for example in prompts(model)]
    served = engine(model, **limits)
    answers = run(served, requests)
    if "pages" in limits:
        assert served.stats().preemptions > 0
    for request, tokens in answers.items():
        if "images" not in request.example:
            assert not {token.id for token in tokens} & set(model.tokenizer.point_token_ids)
            continue
        ids, places = expected(model, request.example)
        assert [token.id for token in tokens] == ids
        assert [token.place for token in tokens][: NEW - 1] == places
        assert max(places) >= 0
    assert not served.runner.points._answers


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
