"""The engine: many answers at once are what each would be alone, whoever comes and goes."""

import dataclasses

import numpy as np
import pytest

from molmo_core.generation.events import End, Failed, Ticket, Token
from molmo_core.generation.sampling import SamplingConfig
from pipelines.serving.engine import Engine, Request

GREEDY = SamplingConfig()


class Recorder:
    """What an engine emitted for one row."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.error: Exception | None = None

    def __call__(self, event) -> None:
        assert (self.reason, self.error) == (None, None), "nothing comes after the end"
        match event:
            case Token(token):
                self.tokens.append(token)
            case End(reason):
                self.reason = reason
            case Failed(error):
                self.error = error


@pytest.fixture(scope="module")
def examples(tiny_model):
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    rng = np.random.RandomState(0)
    texts = ["what shape is this?", "why", "is there a red shape in the image?", "what is the color of the circle?"]
    images = [{"image": rng.randint(0, 255, (64, 64, 3), np.uint8)}, {}, {"image": rng.randint(0, 255, (64, 64, 3), np.uint8)}, {}]
    return [preprocess({**image, "style": "demo", "question": text}) for image, text in zip(images, texts)]


def row(example, limit=8, sampling=GREEDY, seed=None) -> Ticket:
    return Ticket(Request({k: v for k, v in example.items() if k != "metadata"}, limit, sampling, seed), Recorder())


def alone(model, example, limit=8) -> list[int]:
    end = model.tokenizer.eos_token_id
    tokens = model.generate(**example, max_new_tokens=limit).token_ids[0].tolist()
    return tokens[: tokens.index(end)] if end in tokens else tokens


def finish(engine: Engine) -> None:
    while engine.active:
        engine.step()


def test_rows_that_join_at_any_time(tiny_model, examples):
    engine = Engine(tiny_model)
    rows = [row(example, limit) for example, limit in zip(examples, (8, 5, 1, 9))]
    engine.admit(rows[:2])
    engine.step()
    engine.step()
    engine.admit(rows[2:3])
    engine.step()
    engine.admit(rows[3:])
    finish(engine)
    for one, example in zip(rows, examples):
        assert one.emit.tokens == alone(tiny_model, example, one.request.max_new_tokens)
        assert one.emit.reason == "length"


def test_end_token(tiny_model, examples, monkeypatch):
    end = alone(tiny_model, examples[0], 3)[2]
    monkeypatch.setattr(tiny_model.tokenizer, "eos_token_id", end)
    engine = Engine(tiny_model)
    rows = [row(example) for example in examples]
    engine.admit(rows)
    finish(engine)
    assert rows[0].emit.reason == "stop"
    assert len(rows[0].emit.tokens) == 2
    for one, example in zip(rows, examples):
        assert one.emit.tokens == alone(tiny_model, example)


def test_cancelled_rows_leave(tiny_model, examples):
    engine = Engine(tiny_model)
    rows = [row(example, 30) for example in examples]
    rows[3].cancelled = True
    engine.admit(rows)
    assert engine.active == 3, "nobody waits for the fourth"
    engine.step()
    rows[0].cancelled = True
    engine.step()
    assert engine.active == 2
    assert len(rows[0].emit.tokens) == 1
    assert rows[0].emit.reason is None
    finish(engine)
    assert rows[1].emit.tokens == alone(tiny_model, examples[1], 30)


def test_sampling_depends_on_the_seed_alone(tiny_model, examples):
    warm = SamplingConfig(do_sample=True, temperature=2.0)

    def sample(seed, company):
        engine, one = Engine(tiny_model), row(examples[0], 8, warm, seed)
        engine.admit([*(row(example, 4, warm, 1) for example in examples[1:company]), one])
        finish(engine)
        return one.emit.tokens

    assert sample(7, company=1) == sample(7, company=4)
    assert sample(7, company=1) != sample(8, company=1)
    assert sample(None, company=1) != sample(None, company=1)


def test_one_bad_row_fails_alone(tiny_model, examples):
    engine = Engine(tiny_model)
    bad = row({**examples[0], "pooled_patches_idx": examples[0]["pooled_patches_idx"][:-1]})  # a feature too few
    good = row(examples[2])
    engine.admit([bad, good])
    finish(engine)
    assert isinstance(bad.emit.error, ValueError)
    assert bad.emit.tokens == []
    assert good.emit.tokens == alone(tiny_model, examples[2])


SAMPLE = SamplingConfig(do_sample=True)
AS_GREEDY = [
    *(SamplingConfig(True, temperature) for temperature in (0.0, 5e-324, 1e-300, 1e-40, 1e-6)),
    *(SamplingConfig(True, 1.0, top_p) for top_p in (5e-324, 1e-300, 1e-40, 1e-7)),
    SamplingConfig(True, 1.0, 1.0, top_k=1),
]
EDGES = [
    *({"sampling": SamplingConfig(True, temperature)} for temperature in (1e-5, 2.0, 1e30)),
    *({"sampling": SamplingConfig(True, 1.0, top_p)} for top_p in (1 - 1e-16, 1.0)),
    *({"sampling": SamplingConfig(True, 1.0, 1.0, top_k)} for top_k in (0, 2**63, 10**30)),
    *({"sampling": SAMPLE, "seed": seed} for seed in (0, 1, -1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 2**64)),
    *({"limit": limit} for limit in (1, 2, 4000)),
]


def test_settings_at_their_edges_do_no_harm(tiny_model, examples):
    """Every edge in one batch: each answer is a good one, and what is greedy beside them is what it is alone."""
    innocent = [row(example) for example in examples]
    greedy = [row(examples[i % 4], sampling=sampling) for i, sampling in enumerate(AS_GREEDY)]
    edges = [row(examples[i % 4], **edge) for i, edge in enumerate(EDGES)]
    engine = Engine(tiny_model)
    engine.admit([*innocent[:2], *edges, *greedy, *innocent[2:]])
    for _ in range(10):
        engine.step()
    for one, edge in zip(edges, EDGES):
        assert one.emit.error is None, edge
        assert one.emit.tokens, edge
    for one, example in zip([*innocent, *greedy], [*examples, *examples * 3]):
        assert one.emit.tokens == alone(tiny_model, example), one.request.sampling


def test_an_error_while_drawing_ends_its_row_alone(tiny_model, examples):
    bad, good = row(examples[0], sampling=dataclasses.replace(SAMPLE, temperature=1.0)), row(examples[1])
    object.__setattr__(bad.request.sampling, "top_p", "most")  # what no check would let through
    engine = Engine(tiny_model)
    engine.admit([bad, good])
    finish(engine)
    assert isinstance(bad.emit.error, TypeError)
    assert good.emit.tokens == alone(tiny_model, examples[1])
