"""Answers with a shared beginning equal the answers to each question alone."""

import numpy as np
import pytest
import torch

from molmo_core.models.base import BaseModelConfig
from pipelines.evaluation.answering import answer, shared_prefix

QUESTIONS = ["what shape is this?", "is there a red shape?", "what is the color of the circle in the image?", "why"]


@pytest.fixture(scope="module")
def model(golden):
    """A random Molmo of the demo's architecture whose blocks weigh more than the last token, so that answers differ."""
    torch.manual_seed(0)
    overrides = [f"llm.tokenizer.identifier={golden / 'tokenizer'}", "llm.vocab_size=1024"]
    model = BaseModelConfig.load("configs/models/demo.yaml", overrides).build_model().eval()
    unreadable = [token for token in range(1024) if not model.tokenizer.decode([token], truncate_at_eos=False).isprintable()]
    with torch.no_grad():
        for parameter in (*model.transformer.blocks.parameters(), *model.vision_backbone.parameters()):
            parameter.mul_(12.0 if parameter.ndim > 1 else 1.0)
        model.transformer.ff_out.weight[unreadable] = 0
    return model


def prompts(model, images: int, questions: int) -> list[list[dict]]:
    preprocess = model.config.build_preprocessor(for_inference=True, is_training=False)
    rng = np.random.RandomState(0)
    pictures = [rng.randint(0, 255, (64, 64, 3), np.uint8) for _ in range(images)]
    return [
        [preprocess({"image": picture, "style": "demo", "question": question}) for question in QUESTIONS[: max(1, questions - i % 2)]]
        for i, picture in enumerate(pictures)
    ]


def alone(model, example: dict, limit: int) -> str:
    return model.generate(**example, max_new_tokens=limit).text[0]


def test_equals_one_by_one(model):
    groups = prompts(model, images=3, questions=4)
    collate = model.config.build_collator(None, None, include_metadata=False)
    texts = answer(model, groups, collate, max_new_tokens=6)
    expected = [[alone(model, example, 6) for example in group] for group in groups]
    assert texts == expected
    assert len({text for group in texts for text in group}) > 3, "the answers should differ, or the test proves nothing"


def test_rows_leave_as_they_end(model, monkeypatch):
    """With one row's third token as the end token, that row ends early; the others must go on undisturbed."""
    groups = prompts(model, images=2, questions=4)
    collate = model.config.build_collator(None, None, include_metadata=False)
    first = answer(model, groups, collate, max_new_tokens=12)
    for k in range(4):
        end = int(model.generate(**groups[0][k], max_new_tokens=3).token_ids[0, 2])
        monkeypatch.setattr(model.tokenizer, "eos_token_id", end)
        texts = answer(model, groups, collate, max_new_tokens=12)
        assert texts == [[alone(model, example, 12) for example in group] for group in groups]
        assert len(texts[0][k]) < len(first[0][k])
        assert sum(a == b for group, others in zip(texts, first) for a, b in zip(group, others)) >= 3
        monkeypatch.undo()


def test_single_question(model):
    groups = prompts(model, images=1, questions=1)
    collate = model.config.build_collator(None, None, include_metadata=False)
    assert answer(model, groups, collate, 5) == [[alone(model, groups[0][0], 5)]]


def test_shared_prefix():
    def example(*ids):
        return {"input_ids": np.array(ids)}

    media = frozenset({9})
    assert shared_prefix([example(1, 9, 9, 4, 5), example(1, 9, 9, 4, 6, 7)], media) == 4
    assert shared_prefix([example(1, 9, 9, 4, 5), example(1, 9, 9, 4, 5)], media) == 4, "a token must be left to read"
    assert shared_prefix([example(1, 4, 9), example(1, 5, 9)], media) == 0, "media after what differs"
    assert shared_prefix([example(1, 4, 9, 5)], media) == 3
    assert shared_prefix([example(2, 5), example(2, 6)], media) == 1
