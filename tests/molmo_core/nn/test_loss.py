import pytest
import torch
import torch.nn.functional as F

from molmo_core.nn.loss import chunked_loss_sums, loss_positions, loss_sums, loss_weights


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


@pytest.mark.parametrize(
    ("chunk", "heads", "scale", "autocast"), [(1, 1, 1.0, False), (3, 2, 0.5, False), (100, 1, 0.5, False), (4, 2, 1.0, True)]
)
def test_chunks_give_the_same_loss_and_gradients(chunk, heads, scale, autocast):
    torch.manual_seed(0)
    matrices = [torch.randn(rows, 8, requires_grad=True) for rows in (12, 3)[:heads]]
    labels, weights = torch.randint(0, 12, (10,)), torch.rand(10) * (torch.rand(10) > 0.3)
    results = []
    for chunked in (False, True):
        hidden = torch.randn(10, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if chunked:
                sums = chunked_loss_sums(hidden, matrices, labels, weights, 0.1, scale, chunk)
            else:
                sums = loss_sums(scale * F.linear(hidden, torch.cat(matrices)), labels, weights, 0.1)
        gradients = torch.autograd.grad(3 * sums.total, (hidden, *matrices))
        torch.testing.assert_close(sums.total, sums.cross_entropy + 0.1 * sums.z)
        results.append((*sums, *gradients))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, **({"atol": 0.1, "rtol": 0.02} if autocast else {}))


def test_what_is_frozen_has_no_gradient():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(12, 8)
    chunked_loss_sums(hidden, [head], torch.tensor([1, 2, 3, 4]), torch.ones(4)).total.backward()
    assert hidden.grad.any()
    assert head.grad is None
    head.requires_grad_()
    with torch.no_grad():
        assert not chunked_loss_sums(hidden, [head], torch.tensor([1, 2, 3, 4]), torch.ones(4)).total.requires_grad


def test_going_backward_twice_is_refused():
    head = torch.randn(12, 8, requires_grad=True)
    total = chunked_loss_sums(torch.randn(1, 8), [head], torch.tensor([1]), torch.ones(1)).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        total.backward()


def test_no_label_at_all_keeps_the_graph():
    """A rank without a loss must still take part in the backward pass."""
    labels = torch.full((1, 4), -1)
    positions = loss_positions(labels, None)
    assert positions.tolist() == [0]
    head, hidden = torch.randn(12, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    sums = chunked_loss_sums(hidden[positions], [head], labels.flatten()[positions], torch.zeros(1))
    sums.total.backward()
    assert sums.total.item() == 0
    assert head.grad is not None
    assert not head.grad.any()
    assert not hidden.grad.any()


def test_positions_with_a_weight():
    labels, masks = torch.tensor([[5, -1, 7], [-100, 3, 2]]), torch.tensor([[0.5, 1.0, -1.0], [1.0, 0.0, 2.0]])
    assert loss_positions(labels, masks).tolist() == [0, 5]
    assert loss_positions(labels, None).tolist() == [0, 2, 4, 5]
