import numpy as np
import pytest
import torch

from molmo_core.preprocessing.collator import MEDIA_PADDING, SEQUENCE_PADDING, MMCollator


def example(length, crops=0, tree=False, masks=False, **more):
    ids = np.arange(length)
    result = {
        "input_ids": ids,
        "labels": ids + 1,
        "loss_masks": np.ones(length, np.float32),
        "position_ids": ids,
        "metadata": {"n": length},
    }
    if tree:
        result["subsegment_ids"] = np.full(length, 3)
    if crops:
        result["images"] = np.full((crops, 4, 6), 9, np.uint8)
        result["pooled_patches_idx"] = np.arange(crops * 4).reshape(crops, 4)
    if masks:
        result["image_masks"] = np.ones((crops, 4), np.float32)
    return result | more


def test_padding_to_the_longest():
    batch = MMCollator()([example(3, crops=2, masks=True), example(5)])
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items() if k != "metadata"} == {
        "input_ids": (torch.int64, (2, 5)),
        "labels": (torch.int64, (2, 5)),
        "loss_masks": (torch.float32, (2, 5)),
        "position_ids": (torch.int64, (2, 5)),
        "images": (torch.uint8, (2, 2, 4, 6)),
        "image_masks": (torch.float32, (2, 2, 4)),
        "pooled_patches_idx": (torch.int64, (2, 2, 4)),
    }
    assert batch["input_ids"].tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]]
    assert batch["labels"][0].tolist() == [1, 2, 3, -1, -1]
    assert batch["loss_masks"][0].tolist() == [1, 1, 1, 0, 0]
    assert batch["images"][1].eq(0).all()
    assert batch["pooled_patches_idx"][1].eq(-1).all()
    assert batch["metadata"] == [{"n": 3}, {"n": 5}]


def test_padding_to_the_maximum():
    batch = MMCollator(8, "to_max", include_metadata=False)([example(3, crops=1), example(5, crops=3)])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["images"].shape == (2, 3, 4, 6)
    assert "metadata" not in batch


def test_windows_of_different_size():
    pools = [np.ones((2, 4), np.int64), np.ones((3, 9), np.int64)]
    batch = MMCollator()([example(3, pooled_patches_idx=p) for p in pools])
    assert batch["pooled_patches_idx"].shape == (2, 3, 9)
    assert batch["pooled_patches_idx"][0, :2, 4:].eq(-1).all()


@pytest.mark.parametrize("key", [*SEQUENCE_PADDING, *MEDIA_PADDING])
def test_every_key_of_the_contract(key):
    value = {**SEQUENCE_PADDING, **MEDIA_PADDING}[key]
    dtype = np.float32 if isinstance(value, float) else np.uint8 if key == "images" else np.int64
    shapes = [(3,), (5,)] if key in SEQUENCE_PADDING or key in ("high_res_pos_ids", "high_res_features_weights") else [(3, 2), (5, 2)]
    if key == "images":
        shapes = [(*s, 6) for s in shapes]
    examples = [example(s[0]) | {key: np.full(s, 7, dtype)} for s in shapes]
    batch = MMCollator()(examples)[key]
    assert batch.shape[:2] == (2, 5)
    assert batch[0, :3].eq(7).all()
    assert batch[0, 3:].eq(value).all()


def test_trees_beside_plain_examples():
    batch = MMCollator()([example(2, tree=True), example(3)])
    assert batch["subsegment_ids"].tolist() == [[3, 3, -1], [0, 0, 0]]


def test_the_batch_does_not_share_memory_with_the_examples():
    one = example(3, crops=1)
    batch = MMCollator()([one])
    batch["images"].zero_()
    assert (one["images"] == 9).all()


@pytest.mark.parametrize("pad_mode", [None, "to_max"])
def test_joined_batches_are_what_all_examples_give(pad_mode):
    trees = [example(3, crops=2, tree=True), example(5)]
    plain = [example(2), example(4)]
    images = [example(7, crops=3, masks=True, pooled_patches_idx=np.ones((5, 9), np.int64)), example(1, crops=1)]
    collate = MMCollator(8, pad_mode)
    whole = collate.arrays([*plain, *trees, *images])
    joined = collate.join([collate.arrays(part) for part in (plain, trees, images)])
    assert whole.keys() == joined.keys()
    for key, values in whole.items():
        np.testing.assert_array_equal(joined[key], values, err_msg=key)
    assert collate.join([whole]) is whole


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least one example"),
        ([example(3), example(9)], "example 1 of the batch has 9 tokens, more than the 8"),
        ([example(3, colour=np.ones(2))], r"unknown keys in a preprocessed example: \['colour'\]"),
        ([example(3), {k: v for k, v in example(3).items() if k != "labels"}], "training and inference examples cannot be mixed"),
        ([example(3, images=np.ones((1, 4, 6), np.uint8)), example(3, images=np.ones((1, 4, 6), np.float32))], "dtypes"),
        ([example(3, images=np.ones((1, 4, 6), np.uint8)), example(3, images=np.ones((1, 5, 6), np.uint8))], "differ in patches"),
    ],
)
def test_errors(examples, message):
    with pytest.raises(ValueError, match=message):
        MMCollator(8)(examples)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="'to_128': expected 'to_max' or None"):
        MMCollator(8, "to_128")
    with pytest.raises(ValueError, match="needs max_sequence_length"):
        MMCollator(None, "to_max")
