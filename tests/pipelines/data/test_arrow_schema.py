"""The Arrow schema gives back what it was given, for every kind of example, and refuses what it does not know."""

import gc
import weakref

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines.data import schema

TEXT = {
    "input_ids": np.arange(5),
    "labels": np.array([1, 2, 3, 4, -1]),
    "loss_masks": np.array([0, 0, 1, 0.5, 0], np.float32),
    "position_ids": np.arange(5),
    "metadata": {"id": "é", "sizes": [[1, 2]]},
}
IMAGE = {
    "input_ids": np.arange(3),
    "subsegment_ids": np.array([10000, 0, 1]),
    "images": np.arange(2 * 4 * 12, dtype=np.uint8).reshape(2, 4, 12),
    "image_masks": np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4),
    "pooled_patches_idx": np.array([[0, 1, -1], [2, 3, 4]]),
    "metadata": {},
}
HE = {
    "input_ids": np.arange(2),
    "images": np.ones((1, 2, 3), np.float32) / 3,
    "low_res_tokens_idx": np.array([[0], [1]]),
    "high_res_tokens_idx": np.array([[1], [0]]),
    "high_res_pos_ids": np.array([4, 5]),
    "high_res_features_weights": np.ones(2, np.float32),
    "low_to_high": np.eye(2, dtype=np.float32),
    "metadata": {},
}


def same(a, b):
    assert a.keys() == b.keys()
    for key in a.keys() - {"metadata"}:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def test_kinds_share_one_file(tmp_path):
    examples = [TEXT, IMAGE, HE]
    path = tmp_path / "x.arrow"
    schema.write(path, [schema.to_table(examples, ["a", "b", "c"], [0, 7, 2]), schema.to_table([IMAGE], ["d"], [1])])
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.schema.equals(schema.SCHEMA, check_metadata=True)
    for found, expected in zip(schema.from_table(table), [*examples, IMAGE], strict=True):
        same(found, expected)
    assert schema.from_table(table)[0]["metadata"] == {"source": "a", "row": 0, "id": "é", "sizes": [[1, 2]]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.arrow"], "temporary files stay behind"


def test_empty_media_survive():
    example = {**IMAGE, "images": np.zeros((0, 4, 12), np.uint8), "pooled_patches_idx": np.zeros((0, 4), np.int64)}
    (found,) = schema.from_table(schema.to_table([example], ["a"], [0]))
    assert found["images"].shape == (0, 4, 12)
    assert found["pooled_patches_idx"].shape == (0, 4)


@given(st.lists(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4)) | st.none(), min_size=1, max_size=6))
def test_ragged_pixels(images):
    examples = [{"input_ids": np.arange(i + 1)} | ({} if image is None else {"images": image}) for i, image in enumerate(images)]
    found = schema.from_table(schema.to_table(examples, ["s"] * len(images), range(len(images))))
    for a, b in zip(found, examples, strict=True):
        same({k: v for k, v in a.items() if k != "metadata"}, b)


def test_encoded_pixels_are_not_kept_alive():
    """A copy goes into the table; whoever made the arrays for days on end must get their memory back."""
    pixels = [np.zeros((2, 4, 12), np.uint8) for _ in range(3)]
    table = schema.to_table([{"input_ids": np.arange(2), "images": array} for array in pixels], [""] * 3, [0] * 3)
    alive = [weakref.ref(array) for array in pixels]
    del pixels, table
    gc.collect()
    assert [ref() is None for ref in alive] == [True] * 3


def test_unknown_columns_and_dtypes_are_named():
    with pytest.raises(ValueError, match=r"a.jsonl, row 3.*no column for \['depth'\]"):
        schema.to_table([{"input_ids": np.arange(2), "depth": np.zeros(2)}], ["a.jsonl"], [3])
    with pytest.raises(ValueError, match="images are float64"):
        schema.to_table([{"input_ids": np.arange(2), "images": np.zeros((1, 2, 3))}], ["a"], [0])


def test_other_version_is_refused():
    table = schema.to_table([TEXT], ["a"], [0]).replace_schema_metadata({"molmo.examples.version": "0"})
    with pytest.raises(ValueError, match=r"version 0 .*run `python -m jobs.prepare` again"):
        schema.from_table(table)
