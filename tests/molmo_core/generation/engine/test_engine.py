"""The engine: whoever arrives when, is preempted or finds a prefix, every answer is what `generate` gives alone."""

import numpy as np
import pytest
import torch

from molmo_core.generation.engine.decoding import GraphDecoder
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.requests import End, Failed, Request, SamplingParams, Token
from tests.molmo_core.generation.engine.prompts import FAMILY, family_model, family_prompts


def limits(**changes) -> EngineLimits:
    return EngineLimits(**{"max_running": 8, "prefill_tokens": 10_000, "cache_bytes": 64 << 20} | changes)


def pages(model, count: int, page_size: int = 16, **changes) -> EngineLimits:
    """An engine with room for so many pages."""
    from molmo_core.generation.engine.paged import PagedCache

    return limits(cache_bytes=count * PagedCache.page_bytes(model.config.llm, page_size, torch.float32), page_size=page_size, **changes)


def alone(model, example, count: int) -> list[int]:
    """Tokens of `generate`, without the end token."""
    inputs = {k: v for k, v in example.items() if k != "metadata"}
    tokens = model.generate(**inputs, max_new_tokens=count).token_ids[0].tolist()
    end = model.tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def run(engine: Engine, arrivals: list[tuple[int, Request]]) -> dict[Request, list]:
    """Adds requests at their steps and plays to the end; the events of each."""
    events: dict[Request, list] = {request: [] for _, request in arrivals}
    arrivals = sorted(arrivals, key=lambda a: a[0])
    step = 0
    while arrivals or engine.active:
        while arrivals and arrivals[0][0] <= step:
            engine.add(arrivals.pop(0)[1])
        for request, event in engine.step():
            events[request].append(event)
        step += 1
        assert step < 5000
    return events


def tokens_of(events: list) -> list[int]:
    assert isinstance(events[-1], End), events[-1]
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", ["plenty", "preempted", "chunks", "slices", "ahead"])
def test_answers_equal_generate(name, kind, golden):
    """Every model of the family: text, one image, several images, video as it takes them; repeated prompts find prefixes."""
    model = family_model(name, golden)
    examples = family_prompts(name, model, golden)
    rng = np.random.RandomState(0)
    longest = max(len(example["input_ids"]) for example in examples)
    setting = {
        "plenty": limits(page_size=16),
        "preempted": pages(model, (longest + 24) // 4 + 3, page_size=4, slice_tokens=16),
        "chunks": limits(prefill_tokens=24, page_size=8),
        "slices": limits(page_size=16, slice_tokens=1),
        "ahead": limits(page_size=16, max_running=4),
    }[kind]
    engine = Engine(model, setting)
    if kind == "ahead":  # as on a GPU, but without graphs
        engine.decoder = GraphDecoder(model, engine.runner.cache, 4, 100)
    order = [*range(len(examples)), *rng.choice(len(examples), 6)]
    most = 24 if kind == "preempted" else 12
    requests = [Request(examples[i], SamplingParams(max_tokens=int(rng.randint(most // 2, most)))) for i in order]
    events = run(engine, [(int(rng.randint(0, 15)), request) for request in requests])
    for i, request in zip(order, requests):
        assert tokens_of(events[request]) == alone(model, examples[i], request.params.max_tokens), f"{name} prompt {i}"
    pool = engine.scheduler.pool
    assert pool.available == pool.total, "all pages are free again"
    if kind == "preempted" and len(examples) > 2 and "within" not in name:  # those that share most of their pages have room enough
        assert engine.scheduler.preemptions > 0 or "causal" in name
    if not model.FILLS_CACHE and kind == "plenty":
        assert engine.scheduler.prefix_tokens > 0
    if kind == "plenty" and any("images" in example for example in examples):
        assert engine.runner.media.cache.hits > 0


@pytest.fixture
def model(tiny_model):
    return tiny_model


@pytest.mark.parametrize("leaves", [False, True])
def test_an_answer_goes_on_while_a_prompt_is_read(leaves, model, prompts):
    """One layer a slice: beside each the answer in work grows. A prompt whose client leaves is not read to the end."""
    engine = Engine(model, limits(slice_tokens=1, page_size=8))
    first, second = (Request(prompt, SamplingParams(max_tokens=20, ignore_eos=True)) for prompt in (prompts[0], prompts[3]))
    engine.add(first)
    heard = [*engine.step(), *engine.step()]
    begun = len(heard)
    engine.add(second)
    heard += engine.step()
    assert {request for request, _ in heard} == {first}
    if leaves:
        engine.abort(second)
    while engine.active:
        heard += engine.step()
    order = [request for request, event in heard if isinstance(event, Token)]
    assert order[:begun] == [first] * begun
    if leaves:
        assert order == [first] * 20
    else:
        assert order.index(second) >= begun + model.config.llm.n_layers - 1  # beside the last layer comes its own first token
        assert [event.id for request, event in heard if request is second and isinstance(event, Token)] == alone(model, prompts[3], 20)
    assert [event.id for request, event in heard if request is first and isinstance(event, Token)] == alone(model, prompts[0], 20)
    assert engine.scheduler.pool.available == engine.scheduler.pool.total


@pytest.mark.parametrize("fails", [False, True])
def test_who_leaves_while_prompts_are_read_holds_up_nobody(fails, model, prompts):
    """Two prompts are read together, a layer a slice; whatever happens to one, the other is read as soon as without that."""

    def run_with(leaves: bool) -> list[int]:
        engine = Engine(model, limits(slice_tokens=1, page_size=8))
        first, other, leaver = (Request(prompts[i], SamplingParams(max_tokens=30, ignore_eos=True)) for i in (0, 3, 1))
        engine.add(first)
        engine.step()
        engine.add(other)
        engine.add(leaver)
        heard = []
        for step in range(60):
            if leaves and step == 3:
                assert len(engine._reading.chunks) == 2
                engine.abort(leaver)
                if fails:
                    engine._reading = engine._reading._replace(slices=broken())
            heard += [(request, event.id, step) for request, event in engine.step() if isinstance(event, Token)]
        assert not engine.active
        assert engine.scheduler.pool.available == engine.scheduler.pool.total
        assert not leaves or leaver not in {request for request, _, _ in heard}
        assert [token for request, token, _ in heard if request is other] == alone(model, prompts[3], 30)
        return [step for request, _, step in heard if request is other]

    def broken():
        raise RuntimeError("the device does not like it")
        yield

    steps, undisturbed = run_with(True), run_with(False)
    assert steps[0] <= undisturbed[0]


@pytest.fixture(scope="module")
def prompts(tiny_model):
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    rng = np.random.RandomState(0)
    image = rng.randint(0, 255, (64, 64, 3), np.uint8)
    texts = ["what shape is this?", "why", "is there a red shape in the image?", "what is the color of the circle?"]
    return [preprocess({"image": image, "style": "demo", "question": text}) for text in texts]


@pytest.mark.parametrize("name", FAMILY)
def test_an_answer_begun_elsewhere_goes_on(name, golden):
    """What another engine had generated when it was lost is not generated again, and the rest is as if nothing had happened."""
    model = family_model(name, golden)
    engine = Engine(model, limits(page_size=16))
    for example in family_prompts(name, model, golden):
        for params in (SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, temperature=1.5, seed=3, presence_penalty=0.5)):
            (whole,) = run(engine, [(0, Request(example, params))]).values()
            tokens = tokens_of(whole)
            for count in {1, len(tokens) // 2, len(tokens) - 1} & set(range(1, len(tokens))):
                (rest,) = run(engine, [(0, Request(example, params, tuple(tokens[:count])))]).values()
                assert tokens_of(rest) == tokens[count:]
                assert rest[-1] == whole[-1]
    with pytest.raises(ValueError, match="8 tokens are generated already"):
        engine.add(Request(example, SamplingParams(max_tokens=8), tuple(range(8))))


def test_end_token_and_stop_tokens(model, prompts, monkeypatch):
    free = alone(model, prompts[0], 8)
    engine = Engine(model, limits())
    stop = Request(prompts[0], SamplingParams(max_tokens=8, stop_token_ids=(free[3],)))
    assert tokens_of(run(engine, [(0, stop)])[stop]) == free[: free.index(free[3])]
    monkeypatch.setattr(model.tokenizer, "eos_token_id", free[2])
    end, on = (Request(prompts[0], SamplingParams(max_tokens=8, ignore_eos=ignore)) for ignore in (False, True))
    events = run(engine, [(0, end), (0, on)])
    assert events[end][-1] == End("stop")
    assert tokens_of(events[end]) == free[: free.index(free[2])]
    assert tokens_of(events[on]) == free
    assert events[on][-1] == End("length")


def test_abort_frees_the_pages_within_a_step(model, prompts):
    engine = Engine(model, limits())
    stays, leaves, waits = (Request(prompt, SamplingParams(max_tokens=20)) for prompt in prompts[:3])
    for request in (stays, leaves):
        engine.add(request)
    engine.step()
    engine.step()  # the second waited for the beginning that both prompts share
    engine.add(waits)
    used = engine.scheduler.pool.available
    engine.abort(waits)
    engine.abort(leaves)
    assert engine.scheduler.pool.available > used
    events = []
    while engine.active:
        events += engine.step()
    assert {request for request, _ in events} == {stays}
    assert engine.scheduler.pool.available == engine.scheduler.pool.total
    engine.abort(stays)  # has ended: nothing happens


def test_seeds_do_not_depend_on_the_others(model, prompts):
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=3)
    results = []
    for others in (0, 3):
        request = Request(prompts[0], params)
        noise = [Request(prompt, SamplingParams(max_tokens=7, temperature=1.5)) for prompt in prompts[1 : 1 + others]]
        events = run(Engine(model, limits()), [(0, request), *[(k, one) for k, one in enumerate(noise)]])
        results.append(tokens_of(events[request]))
    assert results[0] == results[1]
    again = Request(prompts[0], SamplingParams(max_tokens=10, temperature=1.0, seed=4))
    assert tokens_of(run(Engine(model, limits()), [(0, again)])[again]) != results[0]


def test_a_prompt_at_fault_fails_alone(model, prompts):
    bad = {**prompts[0], "pooled_patches_idx": prompts[0]["pooled_patches_idx"] + 10_000}
    good, wrong, other = (Request(example, SamplingParams(max_tokens=5)) for example in (prompts[0], bad, prompts[1]))
    events = run(Engine(model, limits()), [(0, good), (0, wrong), (0, other)])
    assert isinstance(events[wrong][-1], Failed)
    assert len(events[wrong]) == 1
    for request, example in ((good, prompts[0]), (other, prompts[1])):
        assert tokens_of(events[request]) == alone(model, example, 5)


def test_what_cannot_be_answered_is_refused_at_once(model, prompts):
    engine = Engine(model, pages(model, 4))
    with pytest.raises(ValueError, match="room for 64"):
        engine.add(Request(prompts[0], SamplingParams(max_tokens=100)))
    with pytest.raises(ValueError, match="the model takes 16,384"):
        engine.add(Request(prompts[0], SamplingParams(max_tokens=20_000)))
    with pytest.raises(ValueError, match="without padding"):
        engine.add(Request({"input_ids": np.array([1, -1])}))
    for places, message in ((np.array([-1, 0]), "none negative"), (np.array([0]), "2 positions"), (np.array([0, 40_000]), "reach 40,001")):
        with pytest.raises(ValueError, match=message):
            engine.add(Request({"input_ids": np.array([1, 2]), "position_ids": places}, SamplingParams(max_tokens=4)))
    assert engine.active == 0
    with pytest.raises(ValueError, match="not even one page"):
        Engine(model, limits(cache_bytes=10))


def test_logprobs_are_the_models(model, prompts):
    request = Request(prompts[0], SamplingParams(max_tokens=3, logprobs=2, temperature=0.7, seed=1))
    events = run(Engine(model, limits()), [(0, request)])[request]
    inputs = {k: torch.tensor(v)[None] for k, v in prompts[0].items() if k != "metadata"}
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1].log_softmax(-1)
    first = events[0]
    assert first.logprobs.token == pytest.approx(expected[first.id].item(), abs=1e-4)
    assert [i for i, _ in first.logprobs.top] == expected.topk(2).indices.tolist()


def test_stats(model, prompts):
    engine = Engine(model, limits(page_size=4))
    assert set(engine.stats()) == {0, engine.scheduler.pool.total}
    first, second = (Request(prompt, SamplingParams(max_tokens=6, ignore_eos=True)) for prompt in prompts[:2])
    engine.add(first)
    engine.step()
    engine.add(second)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.tokens, stats.preemptions) == (1, 1, 1, 0)
    assert stats.pages_used == len(engine.scheduler.running[0].pages) > 0
    assert stats.feature_bytes > 0
    while engine.active:
        engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used, stats.tokens) == (0, 0, 0, 12)
    assert stats.prompt_tokens == sum(len(prompt["input_ids"]) for prompt in prompts[:2])
    assert 0 < stats.prefix_tokens < stats.prompt_tokens
    assert (stats.feature_hits, stats.feature_misses) == (1, 1)


def test_times_of_a_request(model, prompts):
    engine = Engine(model, limits())
    first, again, text = (
        Request(example, SamplingParams(max_tokens=2)) for example in (prompts[0], prompts[0], {"input_ids": np.arange(9)})
    )
    for request in (first, again, text):
        run(engine, [(0, request)])
        assert request.times is not None
        assert request.times.queue >= 0
        assert request.times.prefill > 0
    assert 0 < first.times.vision < first.times.prefill
    assert again.times.vision == text.times.vision == 0, "there was nothing to look at"
