"""The engine: many answers at once are what each would be alone, whoever comes and goes."""

import numpy as np
import pytest

from molmo_core.generation.sampling import SamplingConfig
from pipelines.serving.engine import Engine, Row

GREEDY = SamplingConfig()


class Recorder:
    """What an engine emitted for one row."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.error: Exception | None = None

    def __call__(self, token, reason, error) -> None:
        assert (self.reason, self.error) == (None, None), "nothing comes after the end"
        self.tokens += [] if token is None else [token]
        self.reason, self.error = reason, error


@pytest.fixture(scope="module")
def examples(tiny_model):
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    rng = np.random.RandomState(0)
    texts = ["what shape is this?", "why", "is there a red shape in the image?", "what is the color of the circle?"]
    images = [{"image": rng.randint(0, 255, (64, 64, 3), np.uint8)}, {}, {"image": rng.randint(0, 255, (64, 64, 3), np.uint8)}, {}]
    return [preprocess({**image, "style": "demo", "question": text}) for image, text in zip(images, texts)]


def row(example, limit=8, sampling=GREEDY, seed=None) -> Row:
    return Row({k: v for k, v in example.items() if k != "metadata"}, limit, sampling, seed, Recorder())


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
        assert one.emit.tokens == alone(tiny_model, example, one.max_new_tokens)
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
    bad = row(examples[0])
    bad.example = {**bad.example, "pooled_patches_idx": bad.example["pooled_patches_idx"][:-1]}  # a feature too few
    good = row(examples[2])
    engine.admit([bad, good])
    finish(engine)
    assert isinstance(bad.emit.error, ValueError)
    assert bad.emit.tokens == []
    assert good.emit.tokens == alone(tiny_model, examples[2])
