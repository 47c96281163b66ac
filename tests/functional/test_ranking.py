"""The best k of each row."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.functional.ranking import top_k

NAN, INF = torch.nan, torch.inf


def test_best_come_first_with_their_own_scores() -> None:
    values, indices = top_k(torch.tensor([[1.0, 5.0, 3.0], [9.0, 7.0, 8.0]]), 2)
    assert indices.tolist() == [[1, 2], [0, 2]]
    assert values.tolist() == [[5.0, 3.0], [9.0, 8.0]]


def test_smallest_come_first_on_request() -> None:
    values, indices = top_k(torch.tensor([[1.0, -5.0, 3.0, NAN]]), 3, largest=False)
    assert indices.tolist() == [[1, 0, 2]]
    assert values.tolist() == [[-5.0, 1.0, 3.0]]


@pytest.mark.parametrize("largest", [True, False])
def test_nan_is_never_among_the_best(largest: bool) -> None:
    scores = torch.tensor([[NAN, 2.0, NAN, 1.0, NAN]])
    _, indices = top_k(scores, 2, largest=largest)
    assert sorted(indices[0].tolist()) == [1, 3]


@pytest.mark.parametrize("largest", [True, False])
def test_nan_comes_after_the_worst_infinity(largest: bool) -> None:
    worst = -INF if largest else INF
    _, indices = top_k(torch.tensor([[NAN, worst, 1.0]]), 3, largest=largest)
    assert indices.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("largest", [True, False])
def test_ties_go_to_the_lower_index(largest: bool) -> None:
    scores = torch.zeros(2, 1000)
    _, indices = top_k(scores, 1000, largest=largest)
    assert torch.equal(indices, torch.arange(1000).expand(2, -1))


def test_infinite_scores_are_ranked_by_sign() -> None:
    values, indices = top_k(torch.tensor([[0.0, -INF, INF]]), 3)
    assert indices.tolist() == [[2, 0, 1]]
    assert values.tolist() == [[INF, 0.0, -INF]]


@pytest.mark.parametrize("largest", [True, False])
def test_order_equals_a_full_sort(largest: bool) -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    values, _ = top_k(scores, 7, largest=largest)
    assert torch.equal(values, scores.sort(dim=1, descending=largest).values[:, :7])
