"""MolmoPoint against the published numbers, and what these do not show: batches, beams, half precision, options."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from molmo_core.config import ConfigError
from molmo_core.generation.generate import Decoder, answer_text, prompt_batch
from molmo_core.metrics import Target, Truth, metric
from molmo_core.model_configs.molmo_point import MolmoPointConfig
from molmo_core.models.molmo_point import MolmoPoint
from molmo_core.preprocessing.point_places import points_of
from molmo_core.preprocessing.point_tokens import chosen_points
from molmo_core.preprocessing.points import extract_points
from molmo_core.tokens import NO_MORE_POINTS
from tests.molmo_core.models.golden_point import cases, inputs_here, load_config, load_point_model, name_here

SETS = ("a", "c")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=SETS)
def folder(golden: Path, request: pytest.FixtureRequest) -> Path:
    return golden / "molmo-point" / request.param


@pytest.fixture(scope="module")
def model(folder: Path) -> MolmoPoint:
    return load_point_model(folder)


def close(ours: torch.Tensor, published: torch.Tensor) -> None:
    """Within 1e-5 of the largest value."""
    torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-5 * float(published.abs().max()))


def test_published_logits_losses_and_gradients(folder: Path, model: MolmoPoint) -> None:
    batches, expected = (cases(load_file(folder / f"{name}.safetensors")) for name in ("batch", "expected"))
    names = json.loads((folder / "info.json").read_text())["grad_norm_names"]
    parameters = dict(model.named_parameters())
    assert {name_here(name) for name in names} == parameters.keys()
    for case, published in expected.items():
        batch = inputs_here(batches[case])
        model.zero_grad(set_to_none=True)
        output = model(**batch, loss_divisor=float(published["divisor"]), z_loss_weight=1e-4)
        close(output.logits[batch["loss_masks"] > 0], published["logits_response"])
        real = batch["input_ids"][:, ::32] >= 0
        close(output.logits[:, ::32][real], published["logits_every32"][real])
        close(output.loss, published["total"])
        for name in ("patch", "subpatch", "location"):
            for kind in ("loss", "acc"):
                close(output.metrics[f"{name}_{kind}"], published[f"{name}_{kind}_sum"] / published[f"{name}_{kind}_n"])
        output.loss.backward()
        ours = torch.stack([parameters[name_here(name)].grad.norm() for name in names])
        torch.testing.assert_close(ours, published["grad_norm"], rtol=1e-5, atol=1e-6)  # of keys' biases nothing but rounding is left


def test_published_point_logits(folder: Path, model: MolmoPoint) -> None:
    batches, expected = (cases(load_file(folder / f"{name}.safetensors")) for name in ("batch", "expected"))
    for case, published in expected.items():
        batch = {k: v for k, v in inputs_here(batches[case]).items() if k not in ("labels", "loss_masks")}
        sources = model.point_sources(model.inputs(batch))
        assert torch.equal(sources.numbers, batches[case]["image_pos_ids"][..., 0].clamp(min=0))
        with torch.no_grad():
            internal = model(**batch).internal
        for name in ("patch_logits", "subpatch_logits", "location_logits"):
            masked = published[name] <= -1e5
            assert torch.equal(internal[name] <= -1e5, masked), (case, name)
            close(internal[name][~masked], published[name][~masked])


def test_weighted_point_losses(folder: Path) -> None:
    """The published trainer never passes the weights; with them its losses are ours with `weigh_point_losses`."""
    model = load_point_model(folder)
    batches, expected = (cases(load_file(folder / f"{name}.safetensors")) for name in ("batch", "expected"))
    for case, published in expected.items():
        batch, losses = inputs_here(batches[case]), []
        for weigh in (False, True):
            model.config.weigh_point_losses = weigh
            with torch.no_grad():
                losses.append(model(**batch, loss_divisor=1.0).loss)
        text = published["text_ce_sum"]
        close(losses[0] - text, published["token_losses"])
        torch.testing.assert_close(losses[1] - text, published["weighted_token_losses"], rtol=1e-4, atol=1e-4)


def test_published_generation(folder: Path, model: MolmoPoint) -> None:
    prompts, published = (cases(load_file(folder / f"{name}.safetensors")) for name in ("prompt", "generated"))
    for case, prompt in prompts.items():
        want = published[case]
        output = model.generate(**inputs_here(prompt), max_new_tokens=48)
        assert output.token_ids.tolist() == want["free_tokens"].tolist(), case
        points = chosen_points(output.token_ids[0], output.internal["point_places"][0], model.tokenizer)
        assert points.tolist() == want["free_points"].tolist(), case
        torch.testing.assert_close(output.scores, want["free_scores"][:, 0], rtol=1e-5, atol=1e-4)


def test_published_points_when_the_text_is_given(folder: Path, model: MolmoPoint) -> None:
    prompts, published = (cases(load_file(folder / f"{name}.safetensors")) for name in ("prompt", "generated"))
    for case, prompt in prompts.items():
        want = published[case]
        tokens = want["forced_tokens"][0]
        decoder = Decoder(model, len(tokens))
        with torch.no_grad():
            logits = decoder.prefill(prompt_batch(model, inputs_here(prompt)))
            forbidden = torch.tensor(list(vars(model.config.point_tokens).values()))
            kept = torch.ones(logits.shape[1], dtype=torch.bool).index_fill(0, forbidden, False)
            close(logits[0, kept], want["prefill_logits"][0, 0, kept])
            for token in tokens[:-1]:
                decoder.step(token[None])
        points = chosen_points(tokens[:-1], decoder.internal["point_places"][0], model.tokenizer)
        assert points.tolist() == want["forced_points"].tolist(), case


def together(model: MolmoPoint, folder: Path) -> tuple[list[dict[str, object]], Tensors]:
    """Prompts with one image, a video, several images and none, alone and as a batch."""
    rows = [{k: v[0].numpy() for k, v in inputs_here(p).items()} for p in cases(load_file(folder / "prompt.safetensors")).values()]
    rows.append({"input_ids": rows[0]["input_ids"][-20:]})
    return rows, model.config.build_collator(None, None, include_metadata=False)(rows)


def test_batches_give_what_each_row_gives_alone(folder: Path, model: MolmoPoint) -> None:
    """The published code raises for more than one row. Pool widths, lengths and numbers of tokens differ; one row cannot point."""
    rows, batch = together(model, folder)
    output = model.generate(**batch, max_new_tokens=24, min_new_tokens=24)
    for i, row in enumerate(rows):
        alone = model.generate(**row, max_new_tokens=24, min_new_tokens=24)
        assert output.token_ids[i].tolist() == alone.token_ids[0].tolist()
        assert output.internal["point_places"][i].tolist() == alone.internal["point_places"][0].tolist()
    assert not set(output.token_ids[-1].tolist()) & set(vars(model.config.point_tokens).values())


def test_beams_carry_their_points(folder: Path, model: MolmoPoint) -> None:
    prompt = inputs_here(cases(load_file(folder / "prompt.safetensors"))["image_prompt"])
    output = model.generate(**prompt, max_new_tokens=12, num_beams=3)
    places = output.internal["point_places"]
    for beam, tokens in enumerate(output.beams[0]):
        decoder, score = Decoder(model, 12), 0.0
        with torch.no_grad():
            logits = decoder.prefill(prompt_batch(model, prompt))
            for token in tokens:
                score += float(logits.log_softmax(-1)[0, token])
                logits = decoder.step(token[None])
        assert score == pytest.approx(float(output.beam_scores[0, beam]), rel=1e-4)
        assert decoder.internal["point_places"][0, :11].tolist() == places[beam].tolist()
    assert (places >= 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(golden: Path, dtype: torch.dtype) -> None:
    folder = golden / "molmo-point" / "a"
    model, published = load_point_model(folder, dtype), cases(load_file(folder / "expected.safetensors"))["packed"]
    batch = inputs_here(cases(load_file(folder / "batch.safetensors"))["packed"])
    output = model(**batch, loss_divisor=float(published["divisor"]), z_loss_weight=1e-4)
    assert output.logits.dtype == dtype
    torch.testing.assert_close(output.loss.detach(), published["total"], rtol=0.02, atol=0)
    prompt = inputs_here(cases(load_file(folder / "prompt.safetensors"))["image_prompt"])
    assert model.generate(**prompt, max_new_tokens=8).scores.isfinite().all()


def test_text_and_unpointed_rows_train_every_parameter(golden: Path) -> None:
    model = load_point_model(golden / "molmo-point" / "a").train()
    ids = torch.randint(1, 400, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tied_models_have_logits_for_the_special_tokens(golden: Path) -> None:
    """The published code cannot run them (its forward call fails)."""
    config = MolmoPointConfig.load(golden / "molmo-point" / "a" / "config.yaml", ["data_formatter.debug=false", "llm.weight_tying=true"])
    model = config.build_model().eval()
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 448 + 128)


def test_labels_must_fit_the_tokens(golden: Path) -> None:
    folder = golden / "molmo-point" / "a"
    batch = inputs_here(cases(load_file(folder / "batch.safetensors"))["image"])
    batch["point_target_ids"] = batch["point_target_ids"][:, :-1]
    with pytest.raises(ValueError, match=r"row 0: 6 tokens 459 of points in input_ids, but 5 labels"):
        load_point_model(folder)(**batch)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("llm.can_predict_extra_tokens=false", "can_predict_extra_tokens"),
        ("sort_points=false", "mask_patches"),
        ("data_formatter.pointing_format=html-v2", "pointing_format"),
        ("connector.pooling_attention_mask=false", "pooling_attention_mask"),
        ("token_prediction_rotary=twh", "token_prediction_rotary"),
        ("data_formatter._location_token=false", "_location_token"),
    ],
)
def test_settings_that_are_not_possible(golden: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MolmoPointConfig.load(golden / "molmo-point" / "a" / "config.yaml", ["data_formatter.debug=false", override])


def test_a_configuration_is_what_it_was(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder)
    config.save(tmp_path / "config.yaml")
    assert MolmoPointConfig.load(tmp_path / "config.yaml") == config


def known_about(folder: Path, case: str) -> tuple[dict[str, object], list[tuple[int, int]]]:
    """What a preprocessor says of a golden prompt, and (width, height) of its images or frames."""
    images = np.load(folder / "images.npz")
    names = {"image_prompt": ["image0"], "multi_prompt": ["image2", "image3"], "video_prompt": ["video"]}[case]
    sizes = [(images[name].shape[-2], images[name].shape[-3]) for name in names]
    return ({"frame_times": [0.0, 0.5, 1.0]}, sizes * 3) if case == "video_prompt" else ({"image_sizes": sizes}, sizes)


def test_published_coordinates(folder: Path, model: MolmoPoint) -> None:
    published = cases(load_file(folder / "generated.safetensors"))
    for case, want in published.items():
        metadata, sizes = known_about(folder, case)
        places = model.config.point_places(metadata)
        for kind in ("free", "forced"):
            found = [point for point in points_of(want[f"{kind}_points"].numpy(), places) if point is not None]
            rows = [[x * sizes[block][0], y * sizes[block][1]] for block, x, y in found]
            blocks = [[places.times[block]] if places.times is not None else [block] * (len(sizes) > 1) for block, _, _ in found]
            ours = np.array([[*block, *row] for block, row in zip(blocks, rows)])
            np.testing.assert_allclose(ours, want[f"{kind}_coordinates_raw"].numpy(), rtol=1e-9)


def forced_text(model: MolmoPoint, want: Tensors, metadata: dict[str, object]) -> str:
    """What clients read of the tokens whose text was given."""
    tokens, triples = want["forced_tokens"][0].tolist(), iter(want["forced_points"].tolist())
    places, row = [], [-1, -1, -1]
    for token in tokens:
        if token not in model.tokenizer.point_token_ids:
            places.append(-1)
            continue
        column = model.tokenizer.point_token_ids.index(token)
        row = next(triples, [NO_MORE_POINTS, -1, -1]) if column == 0 else row
        places.append(row[column])
    return answer_text(model, tokens[:-1], places, metadata)


def test_metrics_read_its_answers(folder: Path, model: MolmoPoint) -> None:
    """F1 of the published pixels is 1, also of several images and of a video; a first point in its box hits, in another it does not."""
    for case, want in cases(load_file(folder / "generated.safetensors")).items():
        metadata, sizes = known_about(folder, case)
        text, rows = forced_text(model, want, metadata), want["forced_coordinates"].tolist()
        at = {"image_prompt": lambda row: None, "multi_prompt": lambda row: row[1] + 1, "video_prompt": lambda row: row[1]}[case]
        targets = [Target(row[-2], row[-1], at(row)) for row in rows]
        truth = Truth(targets=targets, image_sizes=sizes)
        assert metric("pointing", radius=0.002)(text, truth) == {"f1": 1.0, "precision": 1.0, "recall": 1.0}, case
        assert metric("pointing", radius=0.002)(text, Truth(targets=[t._replace(x=t.x + 5) for t in targets], image_sizes=sizes))["f1"] == 0
        x, y = rows[0][-2:]
        for box, hit in (((x - 1, y - 1, x + 1, y + 1), 1.0), ((x + 1, y + 1, x + 3, y + 3), 0.0)):
            boxed = Truth(targets=[targets[0]._replace(box=box)], image_sizes=sizes)
            assert metric("point_in_box")(text, boxed) == {"hit": hit, "valid": 1.0}, case


def test_text_with_coordinates(folder: Path, model: MolmoPoint) -> None:
    """The published points, as text of Molmo2's form: ids as published, coordinates rounded to thousandths."""
    for case, want in cases(load_file(folder / "generated.safetensors")).items():
        metadata, sizes = known_about(folder, case)
        text = forced_text(model, want, metadata)
        assert text.endswith('">cups</points>')
        points = extract_points(text, 1, 1)
        expected = want["forced_coordinates"]
        there = [point is not None for point in points_of(want["forced_points"].numpy(), model.config.point_places(metadata))]
        # Where a point is nowhere, the published numbers of later ones shift; here each keeps its own.
        assert [p.id for p in points] == [number for number, found in enumerate(there, 1) if found]
        for point, published in zip(points, expected, strict=True):
            block = 0 if case == "image_prompt" else int(published[1] * 2) if case == "video_prompt" else int(published[1])
            width, height = sizes[block]
            assert abs(point.x * width - published[-2]) <= width / 1000
            assert abs(point.y * height - published[-1]) <= height / 1000
            assert point.block == (published[1] if case == "video_prompt" else block + 1)
