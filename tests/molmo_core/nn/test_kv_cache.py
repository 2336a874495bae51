"""The cache gives back what went in."""

import torch

from molmo_core.nn.kv_cache import KVCache


def test_updates_append_and_grow():
    cache, pieces = KVCache(max_length=4), []
    for step, length in enumerate((3, 1, 1, 5)):
        keys, values = torch.full((2, 1, length, 2), float(step)), torch.full((2, 1, length, 2), -float(step))
        pieces.append(keys)
        all_keys, all_values = cache.update(0, keys, values)
        assert torch.equal(all_keys, torch.cat(pieces, 2))
        assert torch.equal(all_values, -torch.cat(pieces, 2))
    assert cache.length == 10


def test_length_counts_what_all_layers_hold():
    cache = KVCache(8)
    assert cache.length == 0
    cache.update(0, torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    cache.update(1, torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    assert cache.length == 3


def test_reorder_repeats_drops_and_adds_rows():
    cache = KVCache(4)
    keys = torch.arange(3.0).view(3, 1, 1, 1)
    cache.update(0, keys, keys * 10)
    cache.reorder(torch.tensor([2, 2, 0, 1]))
    all_keys, all_values = cache.update(0, torch.zeros(4, 1, 1, 1), torch.zeros(4, 1, 1, 1))
    assert all_keys[:, 0, 0, 0].tolist() == [2, 2, 0, 1]
    assert all_values[:, 0, 0, 0].tolist() == [20, 20, 0, 10]


def pairs(layers: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full((1, 2, 3, 4), float(layer)), torch.full((1, 2, 3, 4), 10.0 + layer)) for layer in range(layers)]


def test_pairs_are_copied_and_come_back():
    given = pairs()
    cache = KVCache.of(given)
    assert len(cache) == 2
    assert cache.length == 3
    for new, old in zip(cache, given, strict=True):
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[1], old[1])
    cache.update(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    cache[0][0].zero_()
    assert torch.equal(given[0][0], pairs()[0][0])
    assert KVCache.of(cache) is cache
    assert KVCache.of(None).length == len(KVCache.of(None)) == 0


def test_truncated_positions_are_written_again():
    cache = KVCache.of(pairs())
    cache.truncate(2)
    cache.truncate(5)
    assert cache.length == 2
    keys, values = cache.update(1, torch.full((1, 2, 2, 4), 7.0), torch.full((1, 2, 2, 4), 8.0))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 7, 7]
    assert values[0, 1, :, 3].tolist() == [11, 11, 8, 8]
