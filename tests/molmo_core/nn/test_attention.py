"""One rule, four forms: the rule spelled out in plain Python, the dense mask, the block mask, the mask of cached decoding."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from molmo_core.nn.attention import Cached, SequenceLayout, Whole, attend, attention_weights
from molmo_core.nn.kv_cache import KVCache
from molmo_core.nn.sequence_layout import sequence_layout
from molmo_core.tokens import PACK_STRIDE, ImageTokenIds

MOLMO, MOLMO2 = ImageTokenIds.of("molmo", 100), ImageTokenIds.of("molmo2", 100)
MODES = (None, "image_tokens", "within_image", "image_to_question")


@st.composite
def layouts(draw):
    """Random rows of text and images, message trees, packs, answers and padding; (ids, tokens, mode, valid, segments, response)."""
    tokens = draw(st.sampled_from([MOLMO, MOLMO2]))
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        ids, segments, response = [], [], []
        for pack in range(draw(st.integers(1, 3))):
            for _ in range(draw(st.integers(0, 2))):  # images
                start = draw(st.sampled_from([tokens.start, tokens.low_res_start, tokens.frame_start]).filter(lambda i: i is not None))
                image = [start, *[tokens.patch] * draw(st.integers(1, 3)), tokens.col, tokens.end]
                ids += image
                segments += [10_000 + 100_000 * pack] * len(image)
                response += [False] * len(image)
            for annotation in range(draw(st.integers(1, 3))):
                length = draw(st.integers(1, 3))
                ids += [7] * length
                segments += [annotation + 100_000 * pack] * length
                response += [i >= length // 2 for i in range(length)]
        rows.append((ids, segments, response))
    length = max(len(r[0]) for r in rows) + draw(st.integers(0, 3))
    ids, segments, response = (
        torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows]) for i, fill in enumerate((-1, -1, False))
    )
    mode = draw(st.sampled_from(MODES))
    return ids, tokens, mode, ids >= 0, segments if draw(st.booleans()) else None, response if draw(st.booleans()) else None


def plainly(ids, tokens, mode, valid, segments, response) -> torch.Tensor:
    """The rule as the documentation states it, token by token. bool [B, S, S]."""
    batch, length = ids.shape
    allowed = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        image = [i in tokens.all for i in ids[b].tolist()]
        opened, number = [], 0
        for i in ids[b].tolist():
            number += i in ((tokens.start,) if tokens is MOLMO else (tokens.low_res_start, tokens.frame_start))
            opened.append(number)
        pack = [0] * length if segments is None else [s // 100_000 for s in segments[b].tolist()]
        for q in range(length):
            for k in range(length):
                ahead = False
                if mode is not None and image[q] and pack[q] == pack[k]:
                    if mode == "within_image":
                        ahead = image[k] and opened[q] == opened[k]
                    elif mode == "image_tokens":
                        ahead = image[k]
                    else:
                        ahead = image[k] or response is None or not response[b, k]
                see = k <= q or ahead
                if segments is not None:
                    see = see and bool(segments[b, q] <= segments[b, k])
                allowed[b, q, k] = (see and bool(valid[b, q] and valid[b, k])) or q == k
    return allowed


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_all_forms_agree(case):
    ids, tokens, mode, valid, segments, response = case
    batch, length = ids.shape
    layout = sequence_layout(ids, tokens, mode, valid, segments, response)
    expected = plainly(*case)
    dense = layout.dense_mask(batch, length)
    assert torch.equal(dense[:, 0], expected)
    block = layout.block_mask(batch, length, torch.device("cpu"))
    assert torch.equal(create_mask(block.mask_mod, batch, 1, length, length, device="cpu"), dense)
    for queries in {1, length // 2, length} - {0}:
        assert torch.equal(layout.dense_mask(batch, length, queries), dense[:, :, -queries:])


@settings(max_examples=5, deadline=None)
@given(layouts())
def test_flex_attention_equals_dense(case):
    ids, tokens, mode, valid, segments, response = case
    batch, length = ids.shape
    layout = sequence_layout(ids, tokens, mode, valid, segments, response)
    q, k, v = torch.randn(batch, 4, length, 16), torch.randn(batch, 2, length, 16), torch.randn(batch, 2, length, 16)
    dense = attend(q, k, v, layout.dense_mask(batch, length))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the uncompiled form warns that it is slow
        flex = attend(q, k, v, layout.block_mask(batch, length, torch.device("cpu")))
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(dense).all()  # rows of padding, too


@pytest.mark.parametrize("missing", [(), ("valid",), ("segments",), ("groups",), ("questions",), ("valid", "segments")])
def test_the_rule_is_the_one_that_is_told(missing):
    """As the docstring of `SequenceLayout` spells it, for whole sequences and for any positions of them."""
    draw = torch.Generator().manual_seed(0)
    shape = (3, 40)
    examples = torch.randint(0, 3, shape, generator=draw).sort(1).values
    arrays = {
        "valid": torch.rand(shape, generator=draw) > 0.2,
        "segments": examples * PACK_STRIDE + torch.randint(0, 3, shape, generator=draw) * 5_000,
        "groups": torch.randint(-1, 3, shape, generator=draw),
        "questions": torch.rand(shape, generator=draw) > 0.7,
    }
    layout = SequenceLayout(**{name: None if name in missing else values for name, values in arrays.items()})

    def told(b: int, q: int, k: int) -> bool:
        allowed = k <= q
        if layout.groups is not None and layout.groups[b, q] >= 0:
            same_example = layout.segments is None or examples[b, q] == examples[b, k]
            asked = layout.questions is not None and bool(layout.questions[b, k]) and same_example
            allowed = allowed or bool(layout.groups[b, q] == layout.groups[b, k]) or asked
        if layout.segments is not None:
            allowed = allowed and bool(layout.segments[b, q] <= layout.segments[b, k])
        if layout.valid is not None:
            allowed = allowed and bool(layout.valid[b, q]) and bool(layout.valid[b, k])
        return bool(allowed) or q == k

    queries, keys = torch.randperm(40, generator=draw)[:15], torch.randperm(40, generator=draw)
    expected = torch.tensor([[[told(b, q, k) for k in range(40)] for q in range(40)] for b in range(3)])
    assert torch.equal(layout.dense_mask(3, 40)[:, 0], expected)
    b, q, k = torch.arange(3)[:, None, None], torch.arange(15)[:, None], torch.arange(40)
    assert torch.equal(layout.rule(queries, keys)(b, q, k), expected[:, queries][:, :, keys])


def test_packed_example_never_sees_its_neighbour():
    """Images of packed examples do not form one block, although their ids are the same."""
    image = [MOLMO2.low_res_start, MOLMO2.patch, MOLMO2.end]
    ids = torch.tensor([[*image, 7, *image, 7]])
    segments = torch.tensor([[10_000] * 3 + [0] + [110_000] * 3 + [100_000]])
    for mode in MODES:
        mask = sequence_layout(ids, MOLMO2, mode, None, segments).dense_mask(1, 8)[0, 0]
        assert not mask[:4, 4:].any()
        assert not mask[4:, :4].any()
        assert mask[0, 2] == (mode is not None)
        assert mask[4, 6] == (mode is not None)


def test_views_of_an_image():
    """In Molmo each view is its own block; in Molmo2 the global and the high-resolution view are one."""

    def ahead(tokens: ImageTokenIds, first: int) -> bool:
        ids = torch.tensor([[first, tokens.patch, tokens.end, tokens.start, tokens.patch, tokens.end]])
        return bool(sequence_layout(ids, tokens, "within_image").dense_mask(1, 6)[0, 0, 1, 4])

    assert MOLMO2.low_res_start is not None
    assert not ahead(MOLMO, MOLMO.start)
    assert ahead(MOLMO2, MOLMO2.low_res_start)


def test_plain_causal_needs_no_mask():
    layout = SequenceLayout()
    assert layout.is_causal
    assert layout.mask(2, 5, 5, torch.device("cpu"), "sdpa") is None
    assert layout.mask(2, 5, 1, torch.device("cpu"), "sdpa") is None
    chunk = layout.mask(2, 5, 2, torch.device("cpu"), "sdpa")
    assert chunk.tolist() == [[[[True] * 4 + [False], [True] * 5]]] * 2
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(attend(q, k, k, None), attend(q, k, k, layout.dense_mask(1, 5)))


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_grouped_keys(queries, kind):
    """Grouped-query attention equals attention with the keys repeated, for one query (the decoding path) and for several."""
    q, k, v = torch.randn(2, 6, queries, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, queries, 5) > 0.5
    mask[..., 0] = True
    mask = {"bool": mask, "float": torch.randn(2, 1, queries, 5), "none": None}[kind]
    weights = attention_weights(q, k, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, queries))
    expected = weights @ v.repeat_interleave(3, dim=1)
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_weights_are_those_of_the_output(cached):
    """Asked for, the weights of every layer come by its number, over the cache and the call."""
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    past = 4 if cached else 0
    weights: dict[int, torch.Tensor] = {}
    attention = Whole(SequenceLayout().dense_mask(1, 6, 6 - past), weights=weights)
    if cached:
        attention = Cached(KVCache.of([(k[:, :, :past], v[:, :, :past])] * 2), attention)
    outputs = [attention(layer, q[:, :, past:], k[:, :, past:], v[:, :, past:]) for layer in range(2)]
    for layer, out in enumerate(outputs):
        torch.testing.assert_close(weights[layer] @ v.repeat_interleave(2, dim=1), out)
        torch.testing.assert_close(out, attend(q, k, v)[:, :, past:])


def test_segments_cannot_be_continued():
    with pytest.raises(ValueError, match="subsegment_ids"):
        SequenceLayout(segments=torch.zeros(1, 3)).after(2)
