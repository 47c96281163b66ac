"""Do other training seeds give the same ranking? What differs between them is not a fact about the data."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_influence.metrics.checks import check_finite, check_shape
from lightning_influence.metrics.means import MeanOverQueries
from lightning_influence.metrics.ranks import average_ranks, row_correlations


def rank_stability(scores: Tensor) -> Tensor:
    """Spearman's correlation between the scores of two runs, averaged over all pairs of runs and the queries.

    Args:
        scores: of runs that differ in their seed, shape [runs, q, N].

    Returns:
        A float64 scalar between -1 and 1; queries without any order in a run count 0 in its pairs.

    Raises:
        ValueError: if there are fewer than two runs, or a number is not finite.

    Example:
        >>> scores = torch.tensor([[[1.0, 2.0, 3.0]], [[2.0, 3.0, 9.0]]])
        >>> rank_stability(scores).item()
        1.0
    """
    return _stabilities(scores).mean()


class RankStability(MeanOverQueries):
    """`rank_stability` over batches of queries; `update(scores)` with [runs, q, N].

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = RankStability()
        >>> metric.update(torch.tensor([[[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]]]))
        >>> metric.compute().item()
        -1.0
    """

    def update(self, scores: Tensor) -> None:
        """Add the queries of a batch."""
        self.add(_stabilities(scores))


def _stabilities(scores: Tensor) -> Tensor:
    """Of each query, [q]."""
    check_shape(scores, "scores", ("runs", "q", "N"))
    if len(scores) < 2:
        raise ValueError(f"`scores` must hold at least two runs [runs, q, N], got {list(scores.shape)}.")
    check_finite(scores, "scores", "leave out the examples without a valid row in every run")
    ranks = average_ranks(scores)
    found = [row_correlations(ranks[a], ranks[b]) for a, b in itertools.combinations(range(len(scores)), 2)]
    return torch.stack(found).nan_to_num(nan=0.0).mean(0)
