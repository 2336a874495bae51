"""Answers with a shared beginning equal the answers to each question alone."""

import numpy as np
import pytest
import torch

from molmo_core.models.base import BaseModelConfig
from pipelines.evaluation import answering
from pipelines.evaluation.answering import answer, shared_prefix

QUESTIONS = ["what shape is this?", "is there a red shape?", "what is the color of the circle in the image?", "why"]


def prompts(tiny_model, images: int, questions: int) -> list[list[dict]]:
    preprocess = tiny_model.config.build_preprocessor(for_inference=True, is_training=False)
    rng = np.random.RandomState(0)
    pictures = [rng.randint(0, 255, (64, 64, 3), np.uint8) for _ in range(images)]
    return [
        [preprocess({"image": picture, "style": "demo", "question": question}) for question in QUESTIONS[: max(1, questions - i % 2)]]
        for i, picture in enumerate(pictures)
    ]


def alone(tiny_model, example: dict, limit: int) -> str:
    return tiny_model.generate(**example, max_new_tokens=limit).text[0]


def test_equals_one_by_one(tiny_model):
    groups = prompts(tiny_model, images=3, questions=4)
    collate = tiny_model.config.build_collator(None, None, include_metadata=False)
    texts = answer(tiny_model, groups, collate, max_new_tokens=6)
    expected = [[alone(tiny_model, example, 6) for example in group] for group in groups]
    assert texts == expected
    assert len({text for group in texts for text in group}) > 3, "the answers should differ, or the test proves nothing"


def test_rows_leave_as_they_end(tiny_model, monkeypatch):
    """With one row's third token as the end token, that row ends early; the others must go on undisturbed."""
    groups = prompts(tiny_model, images=2, questions=4)
    collate = tiny_model.config.build_collator(None, None, include_metadata=False)
    first = answer(tiny_model, groups, collate, max_new_tokens=12)
    for k in range(4):
        end = int(tiny_model.generate(**groups[0][k], max_new_tokens=3).token_ids[0, 2])
        monkeypatch.setattr(tiny_model.tokenizer, "eos_token_id", end)
        texts = answer(tiny_model, groups, collate, max_new_tokens=12)
        assert texts == [[alone(tiny_model, example, 12) for example in group] for group in groups]
        assert len(texts[0][k]) < len(first[0][k])
        assert sum(a == b for group, others in zip(texts, first) for a, b in zip(group, others)) >= 3
        monkeypatch.undo()


def test_single_question(tiny_model):
    groups = prompts(tiny_model, images=1, questions=1)
    collate = tiny_model.config.build_collator(None, None, include_metadata=False)
    assert answer(tiny_model, groups, collate, 5) == [[alone(tiny_model, groups[0][0], 5)]]


def test_shared_prefix():
    def example(*ids):
        return {"input_ids": np.array(ids)}

    media = frozenset({9})
    assert shared_prefix([example(1, 9, 9, 4, 5), example(1, 9, 9, 4, 6, 7)], media) == 4
    assert shared_prefix([example(1, 9, 9, 4, 5), example(1, 9, 9, 4, 5)], media) == 4, "a token must be left to read"
    assert shared_prefix([example(1, 4, 9), example(1, 5, 9)], media) == 0, "media after what differs"
    assert shared_prefix([example(1, 4, 9, 5)], media) == 3
    assert shared_prefix([example(2, 5), example(2, 6)], media) == 1


@pytest.mark.parametrize("mode", ["image_to_question", "image_tokens", "within_image", None])
def test_image_tokens_that_see_the_question_are_read_with_it(golden, mode, monkeypatch):
    """Each question's first logits are those of the prompt read alone: the greatest difference stays in rounding."""
    torch.manual_seed(0)
    overrides = [f"llm.tokenizer.identifier={golden / 'tokenizer'}", "llm.vocab_size=1024", "llm.max_sequence_length=16384"]
    config = BaseModelConfig.load("configs/models/demo.yaml", [*overrides, f"bi_directional_attn={mode or 'null'}"])
    model = config.build_model().eval()
    read = []
    monkeypatch.setattr(answering, "_greedy", lambda _, logits, *__: read.append(logits) or [([0], [])] * len(logits))
    alone = []
    monkeypatch.setattr(answering, "_separately", lambda *_: alone.append(True) or [["x"] * 4])
    (group,) = prompts(model, images=1, questions=4)
    collate = config.build_collator(None, None, include_metadata=False)
    answer(model, [group], collate, 4)
    assert bool(alone) == (mode == "image_to_question")
    if not alone:
        for k, example in enumerate(group):
            with torch.inference_mode():
                expected = model(**answering.prompt_batch(model, collate([example]))).logits[0, -1]
            assert (read[0][k] - expected).abs().max() < 1e-4
