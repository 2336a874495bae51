import pytest
import torch
import torch.nn.functional as F

from molmo_core.nn.loss import chunked_loss_sums, loss_sums, loss_weights


def test_weights():
    labels = torch.tensor([[5, -1, 7, -100, 3]])
    assert loss_weights(labels, None).tolist() == [[1, 0, 1, 0, 1]]
    assert loss_weights(labels, torch.tensor([[0.5, 1.0, -1.0, 1.0, 0.0]])).tolist() == [[0.5, 0, 0, 0, 0]]


def test_sums():
    logits = torch.randn(6, 10)
    labels, weights = torch.tensor([1, 2, 3, 500, -1, 9]), torch.tensor([1.0, 0.5, 2.0, 0.0, 0.0, 1.0])
    sums = loss_sums(logits, labels, weights)
    kept = weights > 0  # label 500 (a special token, no logit) has no weight
    log_probs = F.log_softmax(logits[kept], -1)
    assert sums.cross_entropy.item() == pytest.approx(-(weights[kept] * log_probs[range(4), labels[kept]]).sum().item(), rel=1e-5)
    assert sums.z.item() == pytest.approx((weights[kept] * logits[kept].logsumexp(-1) ** 2).sum().item(), rel=1e-5)
    assert sums.correct.item() == pytest.approx((weights[kept] * (logits[kept].argmax(-1) == labels[kept])).sum().item())
    with pytest.raises(IndexError):
        loss_sums(logits, torch.full((6,), 500), torch.ones(6))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_give_the_same_loss_and_gradients(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 12)
    labels, weights = torch.randint(0, 12, (10,)), torch.rand(10) * (torch.rand(10) > 0.3)
    results = []
    for chunked in (False, True):
        hidden = torch.randn(10, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        head.zero_grad()
        sums = chunked_loss_sums(head, hidden, labels, weights, chunk) if chunked else loss_sums(head(hidden), labels, weights)
        (sums.cross_entropy + 0.1 * sums.z).backward()
        results.append((*sums, hidden.grad, head.weight.grad.clone()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_no_label_at_all_keeps_the_graph():
    """A rank without a loss must still take part in the backward pass."""
    head, hidden = torch.nn.Linear(8, 12), torch.randn(4, 8, requires_grad=True)
    sums = chunked_loss_sums(head, hidden, torch.full((4,), -1), torch.zeros(4))
    sums.cross_entropy.backward()
    assert sums.cross_entropy.item() == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert not hidden.grad.any()
