"""Arrays of a block keep what is in them while the next block is made, and no longer."""

import numpy as np

from pipelines.data.batches.arena import Arena


def test_memory_is_used_again_after_the_next_block():
    arena = Arena()
    blocks = []
    for number in range(6):
        arrays = [arena.empty((3, 1 << 20), np.uint8), arena.empty((1 << 19,), np.int64), arena.empty((7,), np.float32)]
        for array in arrays:
            array[...] = number
        assert [(a.shape, a.dtype) for a in arrays] == [((3, 1 << 20), np.uint8), ((1 << 19,), np.int64), ((7,), np.float32)]
        if blocks:
            assert all((array == number - 1).all() for array in blocks[-1]), "the block before is still whole"
        blocks.append(arrays)
        arena.next_block()
    assert np.shares_memory(blocks[5][0], blocks[3][0])
    assert np.shares_memory(blocks[5][1], blocks[3][1])
    assert not np.shares_memory(blocks[5][0], blocks[4][0])
    assert not np.shares_memory(blocks[5][0], blocks[5][1])


def test_a_larger_block_gets_its_own_memory():
    arena = Arena()
    arena.empty((2 << 20,), np.uint8)
    arena.next_block()
    first, second = arena.empty((2 << 20,), np.uint8), arena.empty((9 << 20,), np.uint8)
    first[...], second[...] = 1, 2
    assert (first == 1).all()
