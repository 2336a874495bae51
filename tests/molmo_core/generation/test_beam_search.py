"""Beam search against trying every sequence."""

import itertools

import pytest
import torch

from molmo_core.generation.beam_search import BeamSearch


def best_sequences(table: torch.Tensor, eos: int) -> list[tuple[float, list[int]]]:
    """Every sequence of two tokens of a first-order language model `table` [E + 1, E] (last row: start), best first."""
    vocabulary, found = table.shape[1], []
    for first, second in itertools.product(range(vocabulary), repeat=2):
        if first != eos:
            found.append((float(table[-1, first] + table[first, second]), [first, second]))
    found.append((float(table[-1, eos]), [eos, -1]))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_as_many_beams_as_tokens_lose_nothing_in_two_steps(seed):
    eos, vocabulary = 2, 6
    tables = torch.randn(2, vocabulary + 1, vocabulary, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    search = BeamSearch(vocabulary, torch.tensor([eos]), pad_token_id=-1)
    search.start(tables[:, -1])
    search.step(torch.stack([tables[row][search.tokens[row, :, -1]] for row in range(2)]))
    for row in range(2):
        expected = best_sequences(tables[row], eos)[:vocabulary]
        assert search.tokens[row].tolist() == [tokens for _, tokens in expected]
        assert search.scores[row].tolist() == pytest.approx([score for score, _ in expected], abs=1e-5)


def test_a_finished_beam_keeps_its_score_and_is_padded():
    search = BeamSearch(2, torch.tensor([3]), pad_token_id=-1)
    search.start(torch.tensor([[0.1, 0.2, 0.2, 0.5]]).log())
    assert search.finished.tolist() == [[True, False]]
    search.step(torch.tensor([[[0.25] * 4, [0.7, 0.1, 0.1, 0.1]]]).log())
    assert search.tokens[0, 0].tolist() == [3, -1]
    assert search.scores[0].tolist() == pytest.approx([torch.tensor(0.5).log().item(), torch.tensor(0.14).log().item()])


def test_more_beams_than_tokens():
    with pytest.raises(ValueError, match="num_beams=5"):
        BeamSearch(5, torch.tensor([0]), -1).start(torch.zeros(1, 4))
