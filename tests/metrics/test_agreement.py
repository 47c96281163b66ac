"""Rank agreement against SciPy, and what it makes of scores without an order."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from lightning_influence.metrics import mean_rank_correlation


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_of_spearman_correlations() -> None:
    scores, reference = random(5, 40, seed=0), random(5, 40, seed=1)
    expected = sum(spearmanr(a, b)[0] for a, b in zip(scores, reference, strict=True)) / 5
    assert mean_rank_correlation(scores, reference) == pytest.approx(expected, abs=1e-12)


def test_ties_share_their_rank() -> None:
    scores, reference = random(3, 30, seed=2).round(), random(3, 30, seed=3).round()
    expected = sum(spearmanr(a, b)[0] for a, b in zip(scores, reference, strict=True)) / 3
    assert mean_rank_correlation(scores, reference) == pytest.approx(expected, abs=1e-12)


def test_a_query_without_any_order_does_not_count() -> None:
    scores = torch.cat([random(1, 20, seed=4), torch.zeros(1, 20)])
    assert mean_rank_correlation(scores, scores) == pytest.approx(1, abs=1e-6)


def test_no_order_at_all_is_nan() -> None:
    assert math.isnan(mean_rank_correlation(torch.zeros(2, 9), torch.ones(2, 9)))


def test_an_order_in_one_of_them_only_agrees_with_nothing() -> None:
    scores = torch.cat([random(1, 20, seed=4), torch.zeros(1, 20)])
    for one, other in ((scores, scores[:1].expand(2, -1)), (scores[:1].expand(2, -1), scores)):
        assert mean_rank_correlation(one, other) == pytest.approx(0.5)


def test_what_has_no_number_agrees_with_nothing() -> None:
    scores = random(2, 9, seed=5)
    missing = scores.where(scores > scores[0, 0], torch.nan)
    assert math.isnan(mean_rank_correlation(missing, scores))
    assert math.isnan(mean_rank_correlation(scores, missing))
    with pytest.raises(ValueError, match=r"`reference` must have shape \[2, 9\]"):
        mean_rank_correlation(scores, scores[:1])
