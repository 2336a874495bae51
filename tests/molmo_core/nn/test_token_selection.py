"""Scoring and selection on their own; tests/molmo_core/models/test_he_molmo.py compares them with the published numbers."""

import pytest
import torch

from molmo_core.config import ConfigError
from molmo_core.nn.selection_configs import TokenScorerConfig, TokenSelectionConfig
from molmo_core.nn.token_selection import TokenScoring, select_tokens

B, N_LOW, N, D, LAYERS = 2, 4, 6, 8, 3


def scorer(**settings: object) -> TokenScoring:
    torch.manual_seed(0)
    module = TokenScoring()
    module.build_scorer(TokenScorerConfig.new(**settings), D, LAYERS, 1e-6)
    module.reset_scorer()
    return module.eval()


def inputs() -> dict[str, torch.Tensor | list[torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[1, 4:] = False
    return {
        "hidden": [torch.randn(B, 10, D, generator=g) for _ in range(LAYERS)],
        "low_positions": torch.tensor([[2, 3, 4, 5], [3, 4, 5, -1]]),
        "query_position": torch.tensor([6, 6]),
        "high": torch.randn(B, N, D, generator=g) * valid[..., None],
        "high_valid": valid,
        "low_to_high": torch.rand(B, N_LOW * 4, N, generator=g),
    }


def test_linear_scores_are_the_heads_output_spread_over_the_candidates() -> None:
    module, given = scorer(high_res_patch_prior=False), inputs()
    scores, low = module.score_candidates(**given)
    for b, positions in enumerate(given["low_positions"].tolist()):
        features = [torch.cat([h[b, p] for h in given["hidden"]]) * LAYERS**-0.5 for p in positions if p >= 0]
        cells = torch.stack([module.importance_ln.weight @ f for f in features])
        torch.testing.assert_close(low[b, : len(cells)], cells)
        expected = cells.flatten() @ given["low_to_high"][b, : 4 * len(cells)]
        torch.testing.assert_close(scores[b], expected)


def test_one_score_for_all_cells_of_a_low_resolution_token() -> None:
    _, low = scorer(four_scores_per_low_res_patch=False).score_candidates(**inputs())
    assert (low == low[..., :1]).all()
    assert not torch.equal(low[:, 0], low[:, 1])


@pytest.mark.parametrize(
    "settings",
    [
        {"selection_model": "mlp", "normalize_importance_scores": True, "importance_norm": True},
        {"selection_model": "prior_only"},
        {"vector_query": "from_image_end_token"},
        {"vector_query": "from_image_end_token", "vector_query_scaling": True},
        {"learned_rescaling": "norm-with-bias"},
        {"bp_patch_prior": True},
    ],
)
def test_every_kind_of_scorer_trains_and_leaves_detached_inputs_alone(settings: dict[str, object]) -> None:
    module, given = scorer(**settings), inputs()
    given["high"].requires_grad_()
    scores, low = module.score_candidates(**given)
    assert (low is None) == (settings.get("selection_model") == "prior_only")
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    reaches_features = bool(settings.get("bp_patch_prior")) or "vector_query" in settings
    assert (given["high"].grad is not None) == reaches_features
    if settings.get("learned_rescaling"):
        torch.testing.assert_close((scores * given["high_valid"]).sum(-1), torch.zeros(B), atol=1e-5, rtol=0)


def test_random_scores_need_no_parameters() -> None:
    module = scorer(selection_model="random")
    assert not list(module.parameters())
    a, b = module.score_candidates(**inputs())[0], module.score_candidates(**inputs())[0]
    assert not torch.equal(a, b)


def test_best_candidates_first_and_only_real_ones() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.2, 0.4, 9.0, 9.0]])
    candidates = torch.tensor([[True] * 4, [True, True, False, False]])
    slots = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    chosen = select_tokens(TokenSelectionConfig(), scores, candidates, slots, training=False)
    assert chosen.indices[0].tolist() == [1, 2, 3]
    assert chosen.indices[1, :2].tolist() == [1, 0]
    assert chosen.valid.tolist() == [[True] * 3, [True, True, False]]
    assert chosen.importance is None
    assert chosen.loss is None


def test_an_example_may_keep_fewer_tokens_than_its_batch_and_than_there_are_candidates() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.4]])
    slots = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    chosen = select_tokens(TokenSelectionConfig(), scores, torch.ones(2, 2, dtype=torch.bool), slots, training=True)
    assert chosen.valid.tolist() == [[True, True, False], [True, False, False]]
    assert chosen.importance[~chosen.valid].eq(1).all()


@pytest.mark.parametrize(("kind", "power"), [("batch-mean", 1), ("batch-mean", 2), ("example-mean", 2), ("loss-mean", 2)])
def test_selection_loss_pulls_the_mean_scale_to_its_target(kind: str, power: float) -> None:
    scores = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]])
    config = TokenSelectionConfig(loss=kind, loss_pow=power, loss_weight=0.5, offset=0.2, target_scale=0.7)
    chosen = select_tokens(config, scores, torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2), training=True)
    scale = (torch.tensor([[2.0, 1.0], [3.0, 0.5]]) + 0.2).sigmoid()
    torch.testing.assert_close(chosen.importance, scale)
    distance = (scale.mean(1) - 0.7).abs()
    expected = {
        "batch-mean": (scale.mean() - 0.7).abs() ** power,
        "example-mean": (distance**power).mean(),
        "loss-mean": distance.mean() ** power,
    }[kind]
    torch.testing.assert_close(chosen.loss, 0.5 * expected)
    torch.testing.assert_close(chosen.metrics["TokenScaleMean"], scale.mean())
    torch.testing.assert_close(chosen.metrics["TokenScaleVar"], scale.var(unbiased=False))
    torch.testing.assert_close(chosen.metrics["HighResSelection"], torch.tensor(4 / 6))


def test_dropped_scales_are_one_and_leave_the_loss() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 50)
    config = TokenSelectionConfig(dropout=0.5)
    chosen = select_tokens(config, scores, torch.ones(4, 50, dtype=torch.bool), torch.ones(4, 40), training=True)
    dropped = chosen.importance == 1
    assert 40 < dropped.sum() < 120
    torch.testing.assert_close(chosen.metrics["TokenScaleMean"], chosen.importance[~dropped].mean())


def test_no_loss_from_a_batch_without_images_and_none_for_random_selection() -> None:
    scores, none = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert select_tokens(TokenSelectionConfig(), scores, none, torch.zeros(2, 2), training=True).loss == 0
    assert select_tokens(TokenSelectionConfig(), scores, ~none, torch.ones(2, 2), training=True, scaled=False).importance is None


def test_saturated_scores_cost() -> None:
    scores = torch.tensor([[12.0, -0.5]])
    config = TokenSelectionConfig(loss_weight=0.0, saturation_loss=0.5, offset=0.0)
    chosen = select_tokens(config, scores, torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2), training=True)
    torch.testing.assert_close(chosen.loss, torch.tensor(0.5 * 4 / 2))


def test_unimplemented_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="hard"):
        TokenSelectionConfig.new(hard=True)
    with pytest.raises(ConfigError, match="source"):
        TokenScorerConfig.new(source="low_res_embeddings")
