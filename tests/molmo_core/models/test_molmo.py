import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_molmo import PATCH, VOCABULARY, collate, example, tiny_config, tiny_model

from molmo_core.models.image_features import tokens_of_input_idx
from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.attention import Whole
from molmo_core.nn.connector import patchify
from molmo_core.nn.llm import Pass
from molmo_core.preprocessing.tiling import Tiling

IMAGES = [[], [Tiling(1, 1)], [Tiling(2, 3)], [Tiling(1, 2), Tiling(3, 1)]]
BIDIRECTIONAL = [None, "image_tokens", "within_image", "image_to_question"]


@pytest.fixture(scope="module")
def model() -> Molmo:
    return tiny_model()


def logits(model: Molmo, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("mode", BIDIRECTIONAL)
@settings(max_examples=4, deadline=None)
@given(images=st.lists(st.sampled_from(IMAGES), min_size=2, max_size=3))
def test_batched_equals_single(mode, images):
    model = tiny_model(bi_directional_attn=mode)
    examples = [example(model.config, tilings, text=3 + i, seed=i) for i, tilings in enumerate(images)]
    batch = collate(examples)
    together = logits(model, batch)
    for row, single in zip(together, examples):
        alone = logits(model, single)  # one example, numpy, no batch axis
        torch.testing.assert_close(row[: alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", BIDIRECTIONAL)
@settings(max_examples=4, deadline=None)
@given(images=st.lists(st.sampled_from(IMAGES), min_size=2, max_size=3))
def test_packed_equals_separate(mode, images):
    model = tiny_model(bi_directional_attn=mode)
    examples = [example(model.config, tilings, seed=i) for i, tilings in enumerate(images)]
    pack: dict[str, list] = {"input_ids": [], "position_ids": [], "subsegment_ids": [], "images": [], "pooled_patches_idx": []}
    crops = 0
    for n, e in enumerate(examples):
        del e["labels"], e["loss_masks"]
        length = len(e["input_ids"])
        pack["input_ids"].append(e["input_ids"])
        pack["position_ids"].append(np.arange(length))
        pack["subsegment_ids"].append(np.full(length, 100_000 * n))
        if "images" in e:
            pack["images"].append(e["images"])
            idx = e["pooled_patches_idx"]
            pack["pooled_patches_idx"].append(np.where(idx >= 0, idx + crops * 16, -1))
            crops += len(e["images"])
    packed = logits(model, {k: np.concatenate(v) for k, v in pack.items() if v})[0]
    separate = torch.cat([logits(model, e)[0] for e in examples])
    torch.testing.assert_close(packed, separate, atol=1e-4, rtol=1e-4)


def test_message_tree_equals_separate_conversations(model):
    """Annotations share the image and do not see each other."""
    image = example(model.config, [Tiling(1, 2)], text=1)
    prefix, annotations = image["input_ids"][:-1], [np.array([5, 6, 7]), np.array([8, 9]), np.array([10, 11, 12, 13])]
    n = len(prefix)
    tree = {
        **{k: image[k] for k in ("images", "pooled_patches_idx")},
        "input_ids": np.concatenate([prefix, *annotations]),
        "position_ids": np.concatenate([np.arange(n), *(n + np.arange(len(a)) for a in annotations)]),
        "subsegment_ids": np.concatenate([np.full(n, 10_000), *(np.full(len(a), k) for k, a in enumerate(annotations))]),
    }
    parts = logits(model, tree)[0, n:].split([len(a) for a in annotations])
    for annotation, part in zip(annotations, parts):
        alone = logits(model, {**tree, "input_ids": np.concatenate([prefix, annotation]), "position_ids": None, "subsegment_ids": None})
        torch.testing.assert_close(part, alone[0, n:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", BIDIRECTIONAL)
def test_cached_equals_uncached(mode):
    """Prompts of different lengths, padded on the right: prefill, then tokens one at a time, then two at once."""
    model = tiny_model(bi_directional_attn=mode)
    examples = [example(model.config, tilings, text=3, seed=i) for i, tilings in enumerate(IMAGES)]
    lengths = [len(e["input_ids"]) for e in examples]
    prompt = {k: v for k, v in collate(examples).items() if k not in ("labels", "loss_masks")}
    new = torch.randint(2, VOCABULARY, (len(examples), 4))
    with torch.no_grad():
        out = model(**prompt, use_cache=True, last_logits_only=True)
        mask, steps = prompt["input_ids"] >= 0, [out.logits]
        for tokens in new.split([1, 1, 2], dim=1):
            mask = torch.cat((mask, torch.ones_like(tokens, dtype=torch.bool)), dim=1)
            out = model(tokens, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        for i, (e, n) in enumerate(zip(examples, lengths)):
            inputs = {k: v for k, v in e.items() if k not in ("labels", "loss_masks")}
            response = np.arange(n + 4) >= n
            whole = model(**inputs | {"input_ids": np.concatenate((e["input_ids"], new[i].numpy())), "response_mask": response})
            torch.testing.assert_close(torch.cat(steps, dim=1)[i], whole.logits[0, n - 1 :], atol=1e-4, rtol=1e-4)


def test_a_cache_of_pairs_is_continued_and_left_as_it_is(model):
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        pairs = [(k.clone(), v.clone()) for k, v in model(ids[:, :6], use_cache=True).past_key_values]
        assert [k.shape for k, _ in pairs] == [(2, 2, 6, 8)] * 2
        for _ in range(2):
            out = model(ids[:, 6:], past_key_values=pairs, use_cache=True)
            torch.testing.assert_close(out.logits, expected[:, 6:])
            assert [k.shape[2] for k, _ in out.past_key_values] == [9, 9]
        assert model(ids[:, 6:], past_key_values=pairs).past_key_values is None
        attentions = model(ids[:, 6:], past_key_values=pairs, output_attentions=True).attentions
        assert [a.shape for a in attentions] == [(2, 4, 3, 9)] * 2


def test_finished_mask_is_used_as_it_is(model):
    e = example(model.config, [Tiling(1, 1)])
    length = len(e["input_ids"])
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    plain = logits(model, e)
    with torch.no_grad():
        batch = collate([e])
        torch.testing.assert_close(model(**batch, attention_mask=causal).logits, plain)
        additive = torch.zeros(causal.shape).masked_fill(~causal, -torch.inf)
        torch.testing.assert_close(model(**batch, attention_mask=additive).logits, plain)
        with pytest.raises(ValueError, match="attention_mask"):
            model(**batch, attention_mask=torch.ones(1, 3))


def test_selected_logits(model):
    batch = collate([example(model.config, t, text=2 + i, seed=i) for i, t in enumerate(IMAGES)])
    del batch["labels"]
    whole, lengths = logits(model, batch), (batch["input_ids"] >= 0).sum(1)
    rows = torch.arange(4)
    last = logits(model, {**batch, "last_logits_only": True})
    torch.testing.assert_close(last, whole[rows, lengths - 1][:, None])
    left = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] < 0, 0), "attention_mask": batch["input_ids"] >= 0}
    torch.testing.assert_close(logits(model, left)[0, : lengths[0]], whole[0, : lengths[0]])


def test_loss(model):
    batch = collate([example(model.config, t, text=4 + i, seed=i) for i, t in enumerate(IMAGES)])
    batch["loss_masks"] *= torch.rand(batch["loss_masks"].shape)
    output = model(**batch, z_loss_weight=0.1)
    weights = batch["loss_masks"]
    log_probs = output.logits.log_softmax(-1)
    token_losses = -log_probs.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    cross_entropy = (weights * token_losses).sum() / weights.sum()
    z = (weights * output.logits.logsumexp(-1).square()).sum() / weights.sum()
    torch.testing.assert_close(output.loss, cross_entropy + 0.1 * z)
    torch.testing.assert_close(output.metrics["cross_entropy"], cross_entropy.detach())
    torch.testing.assert_close(output.metrics["loss_weight"], weights.sum())
    divided = model(**batch, loss_divisor=2 * weights.sum())
    torch.testing.assert_close(divided.loss, cross_entropy / 2)
    unweighted = model(**{k: v for k, v in batch.items() if k != "loss_masks"})
    torch.testing.assert_close(unweighted.loss, token_losses[batch["labels"] >= 0].mean())
    gradients = []
    for return_logits in (True, False):
        model.zero_grad()
        chunked = model(**batch, return_logits=return_logits, z_loss_weight=0.1)
        chunked.loss.backward()
        torch.testing.assert_close(chunked.loss, output.loss)
        gradients.append([p.grad for p in model.parameters()])
    assert chunked.logits.shape == (4, 0, VOCABULARY)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="labels"):
        model(**batch, last_logits_only=True)


def test_router_losses_are_added_if_asked_for():
    moe = {"block_type": "moe", "moe_num_experts": 4, "moe_top_k": 2}
    plain = tiny_model(llm=moe)
    trained = tiny_model(llm={**moe, "moe_loss_weight": 0.5, "moe_zloss_weight": 0.25})
    batch = collate([example(plain.config, [Tiling(1, 1)])])
    a, b = plain(**batch), trained(**batch)
    added = 0.5 * b.metrics["router_load_balancing"] + 0.25 * b.metrics["router_z"]
    torch.testing.assert_close(b.loss, a.loss + added)
    assert added > 0
    longer = {k: torch.nn.functional.pad(v, (0, 5), value=-1 if k != "loss_masks" else 0) if v.dim() == 2 else v for k, v in batch.items()}
    assert longer["input_ids"].shape != batch["input_ids"].shape
    torch.testing.assert_close(trained(**longer).loss, b.loss)


def test_hidden_states_and_attentions(model):
    e = example(model.config, [Tiling(1, 1)])
    with torch.no_grad():
        output = model(**e, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(model.transformer.logits(output.hidden_states[-1]), output.logits)
    length = len(e["input_ids"])
    assert [h.shape for h in output.hidden_states] == [(1, length, 32)] * 2
    assert [a.shape for a in output.attentions] == [(1, 4, length, length)] * 2
    assert not output.attentions[0][0, :, 0, 1:].any()


# -- images ------------------------------------------------------------------------------------------------------------


def test_images_without_an_index(model):
    """The call of the API document: only input_ids and images; also a batch of which one row has no image."""
    batch = collate([example(model.config, t, seed=i) for i, t in enumerate(IMAGES)])
    bare = {k: batch[k] for k in ("input_ids", "images")}
    torch.testing.assert_close(logits(model, bare), logits(model, {**bare, "pooled_patches_idx": batch["pooled_patches_idx"]}))


def test_pixels_are_patchified(model):
    e = example(model.config, [Tiling(1, 2)])
    pixels = torch.randint(0, 256, (1, 3, 3, 28, 28), dtype=torch.uint8)
    inputs = {"input_ids": e["input_ids"][None], "pooled_patches_idx": e["pooled_patches_idx"][None]}
    torch.testing.assert_close(logits(model, {**inputs, "images": pixels}), logits(model, {**inputs, "images": patchify(pixels, 7)}))


@pytest.mark.parametrize("flat", [False, True])
def test_positions_instead_of_patches(model, flat):
    """The index of the first release says where every cell of every crop goes; margins go nowhere."""
    e = example(model.config, [Tiling(2, 2)])
    tokens = np.flatnonzero(e["input_ids"] == PATCH)
    positions, kept = np.full((5, 4), -100, np.int64), []
    for n, window in enumerate(e["pooled_patches_idx"]):
        crops, rows, cols = np.unravel_index(window[window >= 0], (5, 4, 4))
        cells = set(zip(crops, rows // 2, cols // 2))
        if len(cells) == 1:  # with margins of one patch a window may span crops; such tokens get no feature here
            crop, row, col = cells.pop()
            positions[crop, 2 * row + col] = tokens[n]
            kept.append(n)
    index = positions.ravel()[None] if flat else positions[None]
    by_position = logits(model, {"input_ids": e["input_ids"][None], "images": e["images"][None], "image_input_idx": index})
    with torch.no_grad():
        x = model.transformer.wte(torch.tensor(e["input_ids"])[None])
        idx = torch.tensor(e["pooled_patches_idx"][None, kept])
        features, _ = model.vision_backbone(torch.tensor(e["images"])[None], None, idx)[0]
        x[0, tokens[kept]] += features[0]
        blocks = model.run(Pass(x, torch.arange(x.shape[1])[None]), Whole())
        expected = model.transformer.logits(blocks.hidden)
    torch.testing.assert_close(by_position, expected, atol=1e-5, rtol=1e-5)
    assert 4 < len(kept) < len(tokens)
    with pytest.raises(ValueError, match="image_input_idx"):
        tokens_of_input_idx(torch.zeros(1, 7, dtype=torch.int64), 5, (4, 4))


def test_token_without_a_feature_is_an_error(model):
    batch = collate([example(model.config, [Tiling(1, 1)]), example(model.config, [Tiling(1, 2)], seed=1)])
    batch["pooled_patches_idx"][1, -1] = -1
    with pytest.raises(ValueError, match=r"row 1: \d+ image tokens"):
        model(**batch)
    cut = {k: v for k, v in batch.items() if k in ("images", "pooled_patches_idx")} | {"input_ids": batch["input_ids"][:, :6]}
    with pytest.raises(ValueError, match="row 0"):
        model(**cut)
    cut.pop("pooled_patches_idx")
    with pytest.raises(ValueError, match="row 0"):
        model(**cut)
    with pytest.raises(TypeError, match="imagez"):
        model(batch["input_ids"], imagez=batch["images"])


def test_text_only_model():
    model = Molmo(MolmoConfig.new(llm=tiny_config().llm, vision_backbone=None))
    assert logits(model, {"input_ids": np.arange(5)}).shape == (1, 5, VOCABULARY)
    with pytest.raises(ValueError, match="text-only"):
        model(torch.arange(5)[None], images=torch.zeros(1, 1, 16, 147))


def test_training_without_an_image_runs_the_vision_tower():
    """Its parameters get (zero) gradients, so that all ranks do the same; the numbers are those of evaluation."""
    model = tiny_model()
    batch = collate([example(model.config, [])])
    expected = model(**batch).loss
    loss = model.train()(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model.vision_backbone.parameters())


def test_padding_of_a_batch_does_not_spoil_gradients():
    """Rows of different lengths and images: every gradient is finite."""
    model = tiny_model(bi_directional_attn="within_image").train()
    model(**collate([example(model.config, t, seed=i) for i, t in enumerate(IMAGES)])).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model()
    batch = collate([example(model.config, [Tiling(2, 2)])])
    exact = model(**batch)
    half = model.to(dtype)(**batch)
    assert half.logits.dtype == dtype
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"position_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"position_ids \(2, 4\) must have the shape of input_ids, \(2, 6\)"),
        ({"position_ids": torch.zeros(3, 6, dtype=torch.int64)}, r"position_ids \(3, 6\) must have the shape of input_ids"),
        ({"subsegment_ids": torch.zeros(6, dtype=torch.int64)}, r"subsegment_ids \(6,\) must have the shape of input_ids"),
        ({"labels": torch.zeros(2, 6, dtype=torch.int64), "loss_masks": torch.ones(2, 5)}, r"loss_masks \(2, 5\) must have the shape"),
        ({"attention_mask": torch.ones(2, 6, 6)}, r"attention_mask \(2, 6, 6\) is \[B, K\] .* or a finished mask \[B, 1, S, K\]"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask \(2, 5\) must cover the cache and this call"),
    ],
)
def test_shapes_that_do_not_fit_the_tokens_are_named(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.ones(2, 6, dtype=torch.int64), **inputs)


def test_patches_that_are_not_there_are_named(model):
    batch = {"input_ids": torch.ones(1, 6, dtype=torch.int64), "images": torch.zeros(1, 1, 16, 147, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"a token reads patch 16, but the images have 16"):
        model(**batch, pooled_patches_idx=torch.tensor([[[0, 16, -1, -1]]]))
