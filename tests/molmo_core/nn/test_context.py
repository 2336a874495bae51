"""Which tokens a rank has of a shared sequence. What ranks compute together is tested in tests/pipelines/training/test_parallel.py."""

from pathlib import Path

import pytest
import torch

from molmo_core.models.base import BaseModelConfig
from molmo_core.nn.context import chunk_order


def test_a_rank_has_a_chunk_from_either_end():
    assert chunk_order(12, 3).tolist() == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_token_once_and_as_many_keys_for_each(ranks):
    order = chunk_order(64, ranks)
    assert order.flatten().sort().values.tolist() == list(range(64))
    assert len(set((order + 1).sum(1).tolist())) == 1, "keys that a causal mask shows a rank's tokens"


def test_a_length_that_does_not_divide():
    with pytest.raises(ValueError, match="sequences of 30 tokens cannot be shared by 4 ranks: pad them to a multiple of 8"):
        chunk_order(30, 4)


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("he-molmo", [], "context parallelism: HeMolmo chooses from whole sequences"),
        ("molmo-qwen2-clip", ["llm.block_type=moe"], "context parallelism: a mixture of experts balances whole sequences"),
    ],
)
def test_models_that_need_whole_sequences_say_so(golden: Path, folder: str, changes: list[str], message: str):
    with torch.device("meta"):
        model = BaseModelConfig.load(golden / folder / "config.yaml", changes).build_model()
    with pytest.raises(ValueError, match=message):
        model.share_context(None)
