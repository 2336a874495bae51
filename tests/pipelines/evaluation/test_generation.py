"""An engine gives the answers that batches give, in order, whatever ends first; a prompt it cannot take costs its record."""

import numpy as np
import pytest

from molmo_core.generation.engine.limits import EngineLimits
from pipelines.data.rejects import Rejected
from pipelines.evaluation.generation import BatchAnswers, EngineAnswers, answers_of

QUESTIONS = ["what shape is this?", "is there a red shape?", "what is the color of the circle in the image?", "why"]


@pytest.fixture(scope="module")
def records(tiny_model):
    """Twenty records with one to four questions each."""
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    random = np.random.RandomState(0)
    pictures = [random.randint(0, 255, (64, 64, 3), np.uint8) for _ in range(20)]
    return [
        [preprocess({"image": picture, "style": "demo", "question": question}) for question in QUESTIONS[: 1 + i % 4]]
        for i, picture in enumerate(pictures)
    ]


def test_the_engine_gives_the_answers_of_batches(tiny_model, records):
    assert isinstance(answers_of(tiny_model, 6), BatchAnswers), "on a CPU"
    expected = list(BatchAnswers(tiny_model, 6)(records))
    assert len({text for texts in expected for text in texts}) > 10
    engine = EngineAnswers(tiny_model, 6, EngineLimits(max_running=4, cache_bytes=8 << 20, page_size=16))
    made = []
    answers = engine(made.append(i) or prompts for i, prompts in enumerate(records))
    first = next(answers)
    assert len(made) < len(records), "prompts are made as they are needed"
    assert [first, *answers] == expected
    assert list(engine(records)) == expected, "again, with what is in its caches"
    assert list(engine([])) == []


def test_a_prompt_that_does_not_fit_costs_its_record(tiny_model, records):
    longest = max(len(prompt["input_ids"]) for prompts in records for prompt in prompts)
    page = 16
    pages = -(-(longest + 5) // page)
    engine = EngineAnswers(tiny_model, 6, EngineLimits(page_size=page, cache_bytes=pages * page * page_token_bytes(tiny_model)))
    long = {**records[0][0], "input_ids": np.concatenate([records[0][0]["input_ids"], np.full(64, 5)])}
    long["position_ids"] = np.arange(len(long["input_ids"]))
    found = list(engine([records[0], [records[1][0], long], records[2]]))
    assert isinstance(found[1], Rejected)
    assert "prompt and answer may be" in found[1].detail
    assert [found[0], found[2]] == list(BatchAnswers(tiny_model, 6)([records[0], records[2]]))


def page_token_bytes(model) -> int:
    """Bytes of keys and values of a token."""
    config = model.config.llm
    return 2 * config.n_layers * config.kv_heads * config.head_width * 4
