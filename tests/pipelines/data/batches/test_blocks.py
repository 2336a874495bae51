"""Blocks are plain Arrow, give back what they were made of, and keep it while the next block is made."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from pipelines.data.batches import blocks
from pipelines.data.batches.blocks import BlockWriter, Part

SHAPES = some.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
ARRAYS = st.sampled_from(["uint8", "int64", "float32", "bool"]).flatmap(lambda dtype: some.arrays(dtype, SHAPES))
REJECTS = st.lists(st.tuples(st.text(), st.integers(0, 2**40), st.text(), st.text()), max_size=2)
STATES = st.none() | st.dictionaries(st.integers(0, 99), st.lists(st.integers(-(2**62), 2**62), max_size=3), max_size=3)
PARTS = st.lists(
    st.builds(Part, st.dictionaries(st.text(), ARRAYS, max_size=4), st.dictionaries(st.text(), st.integers(0, 9)), REJECTS, STATES),
    max_size=4,
)


def write(writer: BlockWriter, parts: list[Part]) -> pa.Table:
    for part in parts:
        arrays = {name: writer.empty(array.shape, array.dtype) for name, array in part.arrays.items()}
        for name, array in arrays.items():
            array[...] = part.arrays[name]
        writer.add(part._replace(arrays=arrays))
    return writer.table()


def check(found: Part, expected: Part) -> None:
    assert list(found.arrays) == list(expected.arrays)
    for name, array in expected.arrays.items():
        assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
        assert found.arrays[name].tobytes() == array.tobytes()
        assert not found.arrays[name].flags.writeable
    assert found.tried == expected.tried
    assert list(map(tuple, found.rejected)) == expected.rejected
    assert found.states == expected.states


def parts_of(table: pa.Table) -> list[Part]:
    """Reads a block by its documented columns, with pyarrow and numpy alone."""
    made = []
    for row in range(table.num_rows):
        of = {name: table.column(name)[row].as_py() for name in ("part", "name", "dtype", "shape", "start", "parts")}
        data = table.column("data")[row].as_buffer()
        for number, text in enumerate(of["parts"]):
            fields = json.loads(text)
            arrays = {}
            for part, name, dtype, shape, start in zip(of["part"], of["name"], of["dtype"], of["shape"], of["start"], strict=True):
                if part == number:
                    flat = np.frombuffer(data.slice(start, int(np.prod(shape)) * np.dtype(dtype).itemsize).to_pybytes(), dtype)
                    arrays[name] = flat.reshape(shape)
            states = fields["states"] if fields["states"] is None else {int(s): ints for s, ints in fields["states"].items()}
            made.append(Part(arrays, fields["tried"], fields["rejected"], states))
    return made


@settings(deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=4))
def test_pyarrow_alone_reads_what_was_written(written):
    writer = BlockWriter()
    for expected in written:
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, blocks.SCHEMA) as stream:
            stream.write_table(write(writer, expected))
        table = pa.ipc.open_stream(sink.getvalue()).read_all()
        for read in (parts_of, blocks.read):
            for found, part in zip(read(table), expected, strict=True):
                check(found, part)


@settings(deadline=None)
@given(PARTS, PARTS, PARTS)
def test_blocks_may_be_joined_and_cut(first, second, third):
    joined = pa.concat_tables([write(BlockWriter(), parts) for parts in (first, second, third)])
    for table in (joined.slice(1), joined.combine_chunks().slice(1)):
        for found, part in zip(blocks.read(table), second + third, strict=True):
            check(found, part)


def test_arrays_are_views_of_the_block_and_aligned():
    pixels = np.random.RandomState(0).randint(0, 255, (2, 3000, 200), np.uint8)
    writer = BlockWriter()
    for _ in range(4):
        table = write(
            writer, [Part({"input_ids": np.arange(3), "images": pixels, "image_masks": np.ones((2, 5), np.float32)}, {}, [], None)]
        )
        before = pa.total_allocated_bytes()
        (part,) = blocks.read(table)
        assert pa.total_allocated_bytes() - before < 100_000
        data = table.column("data").chunk(0).buffers()[2]
        for array in part.arrays.values():
            assert data.address <= array.ctypes.data < data.address + data.size
            assert array.flags.aligned


def test_memory_is_used_again_after_the_next_block():
    writer = BlockWriter()
    made = []
    for number in range(6):
        parts = [Part({"a": np.full((3, 1 << 20), number, np.uint8), "b": np.full(7, number)}, {}, [], None)]
        made.append([part.arrays for part in blocks.read(write(writer, parts))])
        for before in range(max(0, number - 1), number + 1):
            assert all((array == before).all() for arrays in made[before] for array in arrays.values()), "the block before is still whole"
    assert np.shares_memory(made[5][0]["a"], made[3][0]["a"])
    assert not np.shares_memory(made[5][0]["a"], made[4][0]["a"])


@pytest.mark.parametrize("sizes", [[1 << 20, 9 << 20, 1 << 10], [0, 5], [3 << 20, 2 << 20]])
def test_a_block_of_any_size_after_one_of_another(sizes):
    writer = BlockWriter()
    for size in [*sizes, *sizes, *sizes]:
        parts = [Part({"a": np.random.RandomState(size % 9).randint(0, 255, size + k, np.uint8)}, {}, [], None) for k in range(3)]
        for found, part in zip(blocks.read(write(writer, parts)), parts, strict=True):
            check(found, part)
