"""Points under CUDA graphs: chosen in the step, read by the host with the tokens; tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molmo_core.generation.engine import point_slots
from molmo_core.generation.engine.decoding import GraphDecoder
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.paged import PagedCache
from molmo_core.generation.engine.requests import Request, SamplingParams, Token
from molmo_core.models.molmo_point import MolmoPoint
from tests.molmo_core.models.golden_point import cases, inputs_here, load_point_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NEW = 40


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "molmo-point" / "a"


@pytest.fixture(scope="module")
def model(folder: Path) -> MolmoPoint:
    """In float16, in which its answers are those of float32."""
    return load_point_model(folder, torch.float16).cuda()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[dict[str, Any]]:
    """An image, several images, a video, and text."""
    rows = [{k: v[0].numpy() for k, v in inputs_here(p).items()} for p in cases(load_file(folder / "prompt.safetensors")).values()]
    return [*rows, {"input_ids": rows[0]["input_ids"][-20:]}]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[dict[str, Any]]) -> list[list[tuple[int, int]]]:
    """Tokens and places that `generate` gives on the CPU, in float32. Of the last token nobody asks what it stands for."""
    model, answers = load_point_model(folder), []
    for example in prompts:
        output = model.generate(**example, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=-7)
        answers.append(list(zip(output.token_ids[0].tolist(), output.internal["point_places"][0].tolist())))
    return answers


def engine_of(model: MolmoPoint, **limits: Any) -> Engine:
    engine = Engine(model, EngineLimits(**{"max_running": 4, "page_size": 16, "cache_bytes": 16 << 20, **limits}))
    assert isinstance(engine.decoder, GraphDecoder)
    return engine


def run(engine: Engine, requests: list[Request]) -> list[list[tuple[int, int]]]:
    """Tokens and places of all answers."""
    answers: dict[Request, list[tuple[int, int]]] = {request: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.active:
        for request, event in engine.step():
            assert not hasattr(event, "error"), event
            if isinstance(event, Token):
                answers[request].append((event.id, event.place))
    return [answers[request] for request in requests]


def asked(prompts: list[dict[str, Any]], **params: Any) -> list[Request]:
    return [Request(example, SamplingParams(max_tokens=NEW, ignore_eos=True, **params)) for example in prompts]


@pytest.mark.parametrize("limits", [{}, {"max_running": 2}, {"overlap": False}, {"prefill_tokens": 50}, {"pages": 14}], ids=str)
def test_graphs_point_as_generate(
    model: MolmoPoint, prompts: list[dict[str, Any]], expected: list[list[tuple[int, int]]], limits: dict[str, Any]
) -> None:
    """Together, in turns, read at once, with prompts in pieces, and preempted."""
    limits = dict(limits)
    if "pages" in limits:
        limits["cache_bytes"] = limits.pop("pages") * PagedCache.page_bytes(model.config.llm, 16, torch.float16)
    engine = engine_of(model, **limits)
    answers = run(engine, asked(prompts))
    same = [answer[:-1] == exact for answer, exact in zip(answers, expected)]
    assert sum(same) >= len(prompts) - 1, "rounding may change one answer, not more"
    for example, answer in zip(prompts, answers):
        assert ("images" in example) == (max(place for _, place in answer) >= 0)
    if "cache_bytes" in limits:
        assert engine.scheduler.preemptions > 0
    assert engine.runner.points.slots._free.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_replayed_step_is_the_step(folder: Path, prompts: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """Step by step: the graph gives the logits and choices of the same code run eagerly on the same state, beside rows that have none."""
    engine = engine_of(load_point_model(folder, dtype).cuda(), overlap=False)
    points, graphs = engine.runner.points.slots, engine.decoder.graphs
    for request in asked(prompts):
        engine.add(request)
    with torch.inference_mode():
        for _ in range(20):
            engine.step()
            before = points._rows.clone(), graphs.state.newest.clone()
            sequences = engine.scheduler.plan().decode
            replayed = engine.decoder.step(sequences).logits.clone()
            rows = points._rows.clone()
            points._rows.copy_(before[0])
            graphs.state.newest.copy_(before[1])
            eager = graphs._step(4).logits
            assert (replayed[: len(sequences)] - eager[: len(sequences)]).abs().max() < 0.01
            assert torch.equal(rows[:4], points._rows[:4])
            points._rows.copy_(before[0])
            graphs.state.newest.copy_(before[1])
    chosen = [answer.places for answer in engine.runner.points._answers.values()]
    assert sum(place >= 0 for places in chosen for place in places) >= 3


def test_running_ahead_and_room_that_grows_change_nothing(
    model: MolmoPoint, prompts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are captured anew when the room for image tokens grows, in the midst of answers; drawn tokens stand for the same."""
    requests = {"temperature": 0.7, "seed": 3}
    plain = run(engine_of(model, overlap=False), asked(prompts, **requests))
    assert run(engine_of(model), asked(prompts, **requests)) == plain
    monkeypatch.setattr(point_slots, "TOKENS", 7)
    engine = engine_of(model, prefill_tokens=50)
    grown = run(engine, asked(prompts, **requests))
    assert engine.runner.points.slots.version > 1
    assert sum(a == b for a, b in zip(plain, grown)) >= len(prompts) - 1


def test_warm_up_captures_without_a_trace(model: MolmoPoint, prompts: list[dict[str, Any]]) -> None:
    """Every size, before and while there are answers."""
    engine = engine_of(model)
    assert engine.warm_up().graphs == 3
    (first,) = asked(prompts[:1])
    engine.add(first)
    tokens: list[tuple[int, int]] = []
    while engine.active:
        if len(tokens) in (5, 6):
            with torch.inference_mode():
                engine.decoder.graphs.capture(1)
        tokens += [(event.id, event.place) for _, event in engine.step() if isinstance(event, Token)]
    (alone,) = run(engine_of(model), asked(prompts[:1]))
    assert tokens == alone
    assert max(place for _, place in tokens) >= 0
