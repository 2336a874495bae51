"""HeMolmo against the published numbers, and what the published numbers do not show: batches, training, reuse of the first pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from molmo_core.config import ConfigError
from molmo_core.models.he_molmo import HeMolmo, HeMolmoConfig
from molmo_core.models.image_features import token_positions

QUESTIONS = [
    ("Point to the dogs.", '<point x="10.5" y="20.1" alt="dogs">dogs</point>'),
    ("How many cups are on the table?", "3"),
]


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "he-molmo"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "expected.safetensors")


def load(folder: Path, *overrides: str) -> HeMolmo:
    """The published weights, where their shapes fit what the overrides ask for."""
    torch.manual_seed(0)
    model = HeMolmoConfig.load(folder / "config.yaml", list(overrides)).build_model()
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    model.load_state_dict({k: v for k, v in weights.items() if not overrides or shapes.get(k) == v.shape}, strict=not overrides)
    return model.eval()


def examples(folder: Path, config: HeMolmoConfig, for_inference: bool = False) -> list[dict[str, Any]]:
    preprocessor = config.build_preprocessor(for_inference=for_inference, is_training=False)
    images = np.load(folder / "images.npz")
    records = [{"style": "demo", "question": q, "answer": a, "image": images[f"image{i}"]} for i, (q, a) in enumerate(QUESTIONS)]
    return [preprocessor(r, np.random.RandomState(0)) for r in records]


@pytest.mark.parametrize("gradients", [False, True])
def test_published_logits_and_selection(folder: Path, expected: dict[str, torch.Tensor], gradients: bool) -> None:
    """Without gradients the second pass goes on from the first one's keys and values, with gradients it does not."""
    batch = load_file(folder / "batch.safetensors")
    with torch.set_grad_enabled(gradients):
        output = load(folder)(**batch)
    valid = (batch["input_ids"] >= 0)[..., None]
    torch.testing.assert_close(output.logits * valid, expected["logits"] * valid, atol=1e-4, rtol=0)
    assert torch.equal(output.internal["selected"], expected["internal.selected"])
    for name in ("high_res_importance", "low_res_importance"):
        torch.testing.assert_close(output.internal[name], expected[f"internal.{name}"], atol=1e-5, rtol=0)


def test_published_generation(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    model, prompt = load(folder), load_file(folder / "prompt.safetensors")
    greedy = model.generate(**prompt, max_new_tokens=12)
    assert greedy.token_ids.tolist() == expected["greedy"][:, 0].tolist()
    assert greedy.internal["selected"].tolist() == expected["internal.selected"][:1].tolist()
    beams = model.generate(**prompt, max_new_tokens=8, num_beams=3)
    assert torch.equal(beams.beams, expected["beam3"])
    torch.testing.assert_close(beams.beam_scores, expected["beam3_scores"], atol=1e-3, rtol=0)


def test_published_preprocessing(folder: Path) -> None:
    config = HeMolmoConfig.load(folder / "config.yaml")
    batch = config.build_collator(None, None)(examples(folder, config))
    reference = load_file(folder / "batch.safetensors")
    assert set(reference) <= set(batch)
    for name, value in reference.items():
        if name == "images":
            real = (batch["images"] > 0).flatten(2).any(-1)
            pixels = batch["images"].float() / 127.5 - 1
            assert (pixels - value)[real].abs().max() <= 2 / 255 + 1e-6
        elif name == "loss_masks":  # padding weighs -1 there, 0 here: the same loss
            torch.testing.assert_close(batch[name], value.clamp(min=0), atol=0, rtol=0)
        elif name == "low_to_high":
            torch.testing.assert_close(batch[name], value, atol=1e-6, rtol=0)
        else:
            assert torch.equal(batch[name], value.to(batch[name].dtype)), name


def test_published_prompt(folder: Path) -> None:
    config = HeMolmoConfig.load(folder / "config.yaml")
    prompt = examples(folder, config, for_inference=True)[0]
    reference = load_file(folder / "prompt.safetensors")
    for name in ("input_ids", "position_ids", "high_res_tokens_idx", "high_res_pos_ids"):
        assert prompt[name].tolist() == reference[name][0].tolist(), name


def test_ratio_decides_how_many_tokens_are_kept_unless_k_is_named(folder: Path) -> None:
    config = HeMolmoConfig.load(folder / "config.yaml", ["selection_ratio=0.3", "mm_preprocessor.num_high_res_features=null"])
    kept = [len(e["high_res_features_weights"]) for e in examples(folder, config)]
    assert kept == [4, 2]  # ceil(0.3 · 12), ceil(0.3 · 4)
    with pytest.raises(ConfigError, match="selection_ratio"):
        HeMolmoConfig.new(selection_ratio=0.0)


@pytest.fixture(scope="module")
def ratio_model(folder: Path) -> HeMolmo:
    return load(folder, "selection_ratio=0.5", "mm_preprocessor.num_high_res_features=null")


def test_batch_equals_single_with_different_k_and_a_text_only_row(folder: Path, ratio_model: HeMolmo) -> None:
    config = ratio_model.config
    text = config.build_preprocessor(for_inference=False, is_training=False)({"style": "demo", "question": "Hello?", "answer": "Yes."})
    rows = [*examples(folder, config), text]
    collate = config.build_collator(None, None, include_metadata=False)
    with torch.no_grad():
        together = ratio_model(**collate(rows)).logits
        for b, row in enumerate(rows):
            alone = ratio_model(**collate([row])).logits[0]
            torch.testing.assert_close(together[b, : len(alone)], alone, atol=1e-5, rtol=0)


def test_reusing_the_first_pass_changes_nothing_whatever_the_question_lengths(folder: Path, ratio_model: HeMolmo) -> None:
    batch = ratio_model.config.build_collator(None, None, include_metadata=False)(examples(folder, ratio_model.config))
    with torch.no_grad():
        reused = ratio_model(**batch, output_hidden_states=True)
    twice = ratio_model(**batch, output_hidden_states=True)
    valid = (batch["input_ids"] >= 0)[..., None]
    for a, b in zip((reused.logits, *reused.hidden_states), (twice.logits, *twice.hidden_states)):
        torch.testing.assert_close(a * valid, b * valid, atol=1e-5, rtol=0)


def test_batched_generation_equals_single(folder: Path, ratio_model: HeMolmo) -> None:
    config = ratio_model.config
    text = config.build_preprocessor(for_inference=True)({"style": "demo", "question": "Hello?"})
    rows = [*examples(folder, config, for_inference=True), text]
    collate = config.build_collator(None, None, include_metadata=False)
    together = ratio_model.generate(**collate(rows), max_new_tokens=6, min_new_tokens=6).token_ids
    alone = [ratio_model.generate(**row, max_new_tokens=6, min_new_tokens=6).token_ids[0].tolist() for row in rows]
    assert together.tolist() == alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    model, batch = load(folder).to(dtype), load_file(folder / "batch.safetensors")
    with torch.no_grad():
        output = model(**batch)
    assert output.logits.dtype == dtype
    assert output.internal["high_res_importance"].dtype == torch.float32
    real = batch["input_ids"] >= 0
    error = (output.logits.float() - expected["logits"])[real].norm() / expected["logits"][real].norm()
    assert error < 0.05
    loss = model.train()(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("attention", [None, "image_tokens"])
def test_cached_generation_equals_repeated_forward(folder: Path, attention: str | None) -> None:
    model = load(folder, f"bi_directional_attn={attention or 'null'}")
    prompt = load_file(folder / "prompt.safetensors")
    tokens = model.generate(**prompt, max_new_tokens=4).token_ids
    ids, positions = prompt["input_ids"], prompt["position_ids"]
    for step in range(4):
        with torch.no_grad():
            logits = model(**{**prompt, "input_ids": ids, "position_ids": positions}).logits[:, -1]
        assert logits.argmax(-1).tolist() == tokens[:, step].tolist()
        ids = torch.cat([ids, tokens[:, step : step + 1]], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)


def test_training_reaches_the_scorer_through_the_attention_values(folder: Path) -> None:
    model = load(folder, "token_scorer.low_res_features_drop=0", "token_scorer.high_res_patch_prior_drop=0", "token_selector.loss_weight=0")
    batch = load_file(folder / "batch.safetensors")
    model.train()(**batch).loss.backward()
    for name in ("importance_ln", "importance_norm", "patch_importance_ln", "patch_importance_norm"):
        assert sum(p.grad.abs().sum() for p in getattr(model, name).parameters()) > 0, name
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_training_loss_includes_the_selection_loss(folder: Path) -> None:
    batch = load_file(folder / "batch.safetensors")
    torch.manual_seed(0)
    output = load(folder).train()(**batch)
    metrics = output.metrics
    assert metrics["selection_loss"] > 0
    torch.testing.assert_close(output.loss.detach(), metrics["cross_entropy"] + metrics["selection_loss"])
    assert 0 < metrics["TokenScaleMean"] < 1
    torch.testing.assert_close(metrics["HighResSelection"], torch.tensor(8 / 16))


def test_gradient_enters_only_the_chosen_blocks_of_the_first_pass(folder: Path) -> None:
    """The scorer's gradient flows back into the blocks bp_low_res_start <= i < bp_low_res_end."""
    batch = load_file(folder / "batch.safetensors")

    def gradients(*overrides: str) -> list[torch.Tensor]:
        model = load(folder, "token_selector.loss_weight=1.0", *overrides).train()
        torch.manual_seed(0)
        model(**batch).loss.backward()
        return [block.ff_out.weight.grad.clone() for block in model.transformer.blocks]

    plain = gradients()
    some = gradients("token_scorer.bp_low_res_start=1", "token_scorer.bp_low_res_end=2")
    changed = [not torch.equal(a, b) for a, b in zip(plain, some)]
    assert changed == [False, True, False]


def test_first_pass_can_be_shorter(folder: Path) -> None:
    model = load(folder, "token_scorer.n_low_res_layers=2", "token_scorer.importance_norm=false")
    assert model.importance_ln.weight.shape == (4, 2 * 64)
    batch = load_file(folder / "batch.safetensors")
    with torch.no_grad():
        reused = model(**batch)
    twice = model(**batch)
    valid = (batch["input_ids"] >= 0)[..., None]
    torch.testing.assert_close(reused.logits * valid, twice.logits * valid, atol=1e-5, rtol=0)


def test_unconditioned_scores_do_not_depend_on_the_question(folder: Path) -> None:
    model = load(folder, "token_scorer.unconditioned=true")
    batch = load_file(folder / "batch.safetensors")
    other = dict(batch, input_ids=torch.where(batch["input_ids"] == 300, 301, batch["input_ids"]))
    with torch.no_grad():
        a, b = model(**batch), model(**other)
    assert torch.equal(a.internal["high_res_importance"], b.internal["high_res_importance"])
    assert not torch.equal(a.logits, b.logits)


def test_text_only_training_step_has_a_gradient_for_every_parameter(folder: Path) -> None:
    model = load(folder).train()
    ids = torch.randint(1, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert model.importance_ln.weight.grad.abs().sum() == 0


def test_scorer_belongs_to_the_connector_group(folder: Path) -> None:
    groups = load(folder).parameter_groups()
    names = {name for name, _ in groups["connector"]}
    assert {"importance_ln.weight", "patch_importance_ln.w2.bias", "importance_norm.weight"} <= names


def test_missing_inputs_are_named(folder: Path) -> None:
    model, batch = load(folder), load_file(folder / "batch.safetensors")
    del batch["low_to_high"]
    with pytest.raises(ValueError, match="low_to_high"):
        model(**batch)
    with pytest.raises(TypeError, match="low_res_pooled_idx"):
        model(**batch, low_res_pooled_idx=torch.zeros(2, 1, 1))


def test_wrong_number_of_slots_is_an_error(folder: Path) -> None:
    model, batch = load(folder), load_file(folder / "batch.safetensors")
    batch["high_res_features_weights"][1, 3] = 0
    with pytest.raises(ValueError, match="row 1: 4 image tokens"):
        model(**batch)


def test_several_images_are_refused(folder: Path) -> None:
    config = HeMolmoConfig.load(folder / "config.yaml")
    image = np.zeros((56, 56, 3), np.uint8)
    with pytest.raises(ValueError, match=r"one image|placeholders"):
        config.build_preprocessor(for_inference=True)({"images": [image, image], "messages": ["Hello?"]})


def test_token_positions() -> None:
    where = torch.tensor([[False, True, False, True], [False] * 4])
    assert token_positions(where, 3).tolist() == [[1, 3, -1], [-1, -1, -1]]
    assert token_positions(where, 6).tolist()[0] == [1, 3, -1, -1, -1, -1]
