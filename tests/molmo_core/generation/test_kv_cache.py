"""The cache gives back what went in."""

import torch

from molmo_core.generation.kv_cache import KVCache


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
