"""Generation against the published code, and what must hold for any input."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molmo_core.generation.generate import generate

MOLMO = ["molmo-qwen2-clip", "molmo-olmo-clip", "molmo-qwen2-siglip-bidir", "molmo-qwen2-dino"]
OTHERS = ["video-olmo/per-frame", "video-olmo/mixed-res", "he-molmo"]
EOS = 405  # a text token of the golden vocabulary that the models do not produce by themselves


@pytest.mark.parametrize("name", MOLMO + OTHERS)
def test_greedy_tokens_equal_the_reference(golden_model, tensors, name):
    expected = tensors(name, "expected")["greedy"][:, 0]
    out = golden_model(name).generate(**tensors(name, "prompt"), max_new_tokens=expected.shape[1])
    assert torch.equal(out.token_ids, expected)
    assert isinstance(out.text[0], str)


@pytest.mark.parametrize("name", [*MOLMO, "he-molmo"])
def test_beam_search_equals_the_reference(golden_model, tensors, name):
    expected = tensors(name, "expected")
    out = golden_model(name).generate(**tensors(name, "prompt"), max_new_tokens=8, num_beams=3)
    assert torch.equal(out.beams, expected["beam3"])
    assert torch.allclose(out.beam_scores, expected["beam3_scores"], atol=1e-3)
    assert torch.equal(out.token_ids, out.beams[:, 0])
    assert torch.equal(out.scores, out.beam_scores[:, 0])


@pytest.fixture
def model(golden_model):
    return golden_model("molmo-qwen2-clip")


@pytest.fixture
def batch(tensors):
    """Two prompts of different lengths with images."""
    return tensors("molmo-qwen2-clip", "batch")


def uncached(model, prompt: dict, steps: int) -> list[int]:
    """Greedy decoding that computes everything anew at every step."""
    prompt, tokens = dict(prompt), []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**prompt).logits[:, -1]
        tokens.append(int(logits.argmax(-1)))
        prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([[tokens[-1]]])], dim=1)
        prompt["position_ids"] = torch.arange(prompt["input_ids"].shape[1])[None]
    return tokens


@pytest.mark.parametrize("name", ["molmo-qwen2-clip", "molmo-qwen2-siglip-bidir"])
def test_cached_equals_uncached(golden_model, tensors, name):
    model, prompt = golden_model(name), tensors(name, "prompt")
    out = model.generate(**prompt, max_new_tokens=6, eos_token_id=EOS)
    assert out.token_ids[0].tolist() == uncached(model, prompt, 6)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 10**6), st.integers(1, 3))
def test_batched_equals_single(model, lengths, seed, beams):
    """Text prompts of any lengths: a row does not depend on its neighbours nor on padding."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 400, (n,), generator=generator) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-1)
    together = model.generate(padded, max_new_tokens=5, num_beams=beams, eos_token_id=EOS)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], max_new_tokens=5, num_beams=beams, eos_token_id=EOS)
        assert together.token_ids[row].tolist() == alone.token_ids[0].tolist()
        assert float(together.scores[row]) == pytest.approx(float(alone.scores[0]), abs=1e-3)


def test_batched_equals_single_with_images(model, batch):
    together = model.generate(**batch, max_new_tokens=5, eos_token_id=EOS)  # labels and loss masks are ignored
    for row in range(2):
        valid = int((batch["input_ids"][row] >= 0).sum())
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        for key in ("input_ids", "position_ids", "labels", "loss_masks"):
            alone[key] = alone[key][:, :valid]
        assert model.generate(**alone, max_new_tokens=5, eos_token_id=EOS).token_ids[0].tolist() == together.token_ids[row].tolist()


def test_rows_end_at_different_times_and_are_padded(model):
    prompts = torch.tensor([[5, 9, 30], [7, 3, 12]])
    free = model.generate(prompts, max_new_tokens=6, eos_token_id=EOS).token_ids
    first = next(i for i in range(1, 6) if free[0, i] not in free[0, :i] and free[0, i] not in free[1, : i + 2])
    ends = [int(free[0, first]), int(free[1, -1])]
    out = model.generate(prompts, max_new_tokens=6, eos_token_id=ends)
    assert out.token_ids[0].tolist() == free[0, : first + 1].tolist() + [-1] * (out.token_ids.shape[1] - first - 1)
    assert out.token_ids.shape[1] > first + 1, "the other row goes on"
    assert out.text[0] == model.tokenizer.decode(free[0, :first].tolist())
    padded = model.generate(prompts, max_new_tokens=6, eos_token_id=ends, pad_token_id=0)
    assert padded.token_ids[0, first + 1 :].tolist() == [0] * (out.token_ids.shape[1] - first - 1)


@pytest.mark.parametrize("beams", [1, 2])
def test_min_new_tokens_blocks_every_end_token(model, beams):
    prompt = torch.tensor([[5, 9, 30]])
    free = model.generate(prompt, max_new_tokens=1, eos_token_id=EOS).token_ids
    ends = [int(free[0, 0]), EOS]
    assert model.generate(prompt, max_new_tokens=6, eos_token_id=ends).token_ids.shape == (1, 1)
    out = model.generate(prompt, max_new_tokens=6, min_new_tokens=4, eos_token_id=ends, num_beams=beams)
    assert out.token_ids.shape[1] >= 4
    assert not set(out.token_ids[0, :4].tolist()) & set(ends)


def test_scores_are_log_probabilities_under_the_model(model, tensors):
    prompt = tensors("molmo-qwen2-clip", "prompt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=True, temperature=1.5, seed=3, eos_token_id=EOS)
    ids = torch.cat([prompt["input_ids"], out.token_ids], dim=1)
    with torch.no_grad():
        logits = model(**{**prompt, "input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}).logits
    log_probs = logits[0, -5:-1].log_softmax(-1)
    assert float(out.scores) == pytest.approx(float(log_probs.gather(1, out.token_ids.T).sum()), abs=1e-3)


def test_seeds_reproduce_and_differ(model):
    prompts = torch.tensor([[5, 9, 30], [7, 3, 12]])

    def sample(seed: int) -> list:
        return model.generate(prompts, max_new_tokens=8, do_sample=True, seed=seed, eos_token_id=EOS).token_ids.tolist()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert len({sample(seed)[0][0] for seed in range(20)}) > 1, "the first token is drawn, too"


def test_top_k_of_one_is_greedy(model):
    prompt = torch.tensor([[5, 9, 30]])
    greedy = model.generate(prompt, max_new_tokens=5, eos_token_id=EOS).token_ids
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=True, top_k=1, eos_token_id=EOS).token_ids, greedy)


def test_one_beam_is_greedy_and_more_beams_never_score_worse_at_one_step(model):
    prompt = torch.tensor([[5, 9, 30], [7, 3, -1]])
    greedy = model.generate(prompt, max_new_tokens=5, eos_token_id=EOS)
    one = model.generate(prompt, max_new_tokens=5, num_beams=1, eos_token_id=EOS)
    assert torch.equal(greedy.token_ids, one.token_ids)
    wide = model.generate(prompt, max_new_tokens=1, num_beams=4, eos_token_id=EOS)
    assert torch.equal(wide.token_ids, greedy.token_ids[:, :1])
    assert (wide.beam_scores.diff(dim=1) <= 0).all(), "best first"


def test_a_preprocessed_example_without_batch_axis(model, tensors):
    prompt = tensors("molmo-qwen2-clip", "prompt")
    arrays = {k: np.asarray(v[0].numpy()) for k, v in prompt.items()}
    expected = model.generate(**prompt, max_new_tokens=4)
    assert torch.equal(generate(model, **arrays, max_new_tokens=4).token_ids, expected.token_ids)


def test_half_precision_generates(golden_model, tensors):
    model = golden_model("molmo-qwen2-clip")
    prompt = tensors("molmo-qwen2-clip", "prompt")
    model.to(torch.bfloat16)
    try:
        out = model.generate(**prompt, max_new_tokens=3, num_beams=2)
    finally:
        model.to(torch.float32)
    assert out.token_ids.shape == (1, 3)
    assert out.scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2, "do_sample": True}, "num_beams=2"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens=3"),
        ({"subsegment_ids": torch.zeros(1, 3)}, "subsegment_ids"),
        ({"attention_mask": torch.zeros(1, 3)}, r"row\(s\) \[0\]"),
    ],
)
def test_contradictions_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 9, 30]]), **arguments)
