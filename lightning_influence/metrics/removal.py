"""Do the scores predict what happens if examples are taken away and the model is trained again?

    leave-one-out   predicted effect of removing n        -scores[q, n]
    leave-k-out     predicted effect of removing a group  -(sum over n in the group of scores[q, n])

against the measurement after training without them minus the measurement of training on all. For a query the
correlation is over the removals; then the mean over queries. For deep networks leave-one-out correlations are
often low (Basu, Pope & Feizi 2020, "Influence functions in deep learning are fragile", arXiv:2006.14651); part of
it is the noise of training, beside which one example does little: average over seeds, or remove groups.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.metrics.checks import check_groups, check_measured, check_scores, check_shape
from lightning_influence.metrics.linear_datamodeling import subset_predictions
from lightning_influence.metrics.means import MeanOverQueries
from lightning_influence.metrics.ranks import rank_correlations, row_correlations

Correlation = Literal["spearman", "pearson"]
CORRELATIONS = {"spearman": rank_correlations, "pearson": row_correlations}


def leave_one_out_correlation(
    scores: Tensor, indices: Tensor, effects: Tensor, *, correlation: Correlation = "spearman"
) -> Tensor:
    """The mean over queries of the correlation between predicted and measured effects of single removals.

    Args:
        scores: shape [q, N].
        indices: the examples that were removed, one at a time, int64 [m].
        effects: measurement after retraining without the example minus with it, shape [m, q].
        correlation: "spearman" or "pearson".

    Returns:
        A float64 scalar; queries without any effect do not count.

    Raises:
        TypeError, ValueError: if shapes do not fit, or a number is not finite.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0, 5.0]])
        >>> leave_one_out_correlation(scores, torch.tensor([0, 2]), torch.tensor([[-0.1], [-0.2]])).item()
        1.0
    """
    return _of_removals(*_single(scores, indices, effects), correlation).nanmean()


def leave_k_out_correlation(
    scores: Tensor, groups: Tensor, effects: Tensor, *, correlation: Correlation = "spearman"
) -> Tensor:
    """The mean over queries of the correlation between predicted and measured effects of removing groups.

    Args:
        scores: shape [q, N].
        groups: bool, which examples were removed together, shape [m, N].
        effects: measurement after retraining without the group minus with it, shape [m, q].
        correlation: "spearman" or "pearson".

    Returns:
        A float64 scalar; queries without any effect do not count.

    Raises:
        TypeError, ValueError: if shapes do not fit, or a number is not finite.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0, 5.0]])
        >>> groups = torch.tensor([[True, True, False], [False, True, True]])
        >>> leave_k_out_correlation(scores, groups, torch.tensor([[-0.3], [-0.7]])).item()
        1.0
    """
    return _of_removals(*_grouped(scores, groups, effects), correlation).nanmean()


class LeaveKOutCorrelation(MeanOverQueries):
    """`leave_k_out_correlation` over batches of queries; `update(scores, groups, effects)`.

    Args:
        correlation: "spearman" or "pearson".
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = LeaveKOutCorrelation(correlation="pearson")
        >>> groups = torch.tensor([[True, True, False], [False, True, True]])
        >>> metric.update(torch.tensor([[1.0, 2.0, 5.0]]), groups, torch.tensor([[-0.3], [-0.7]]))
        >>> metric.compute().item()
        1.0
    """

    def __init__(self, *, correlation: Correlation = "spearman", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_correlation(correlation)
        self.correlation: Correlation = correlation

    def update(self, scores: Tensor, groups: Tensor, effects: Tensor) -> None:
        """Add the queries of a batch."""
        self.add(_of_removals(*_grouped(scores, groups, effects), self.correlation))


class LeaveOneOutCorrelation(LeaveKOutCorrelation):
    """`leave_one_out_correlation` over batches of queries; `update(scores, indices, effects)`.

    Args:
        correlation: "spearman" or "pearson".
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = LeaveOneOutCorrelation()
        >>> metric.update(torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([0, 2]), torch.tensor([[-0.1], [-0.2]]))
        >>> metric.compute().item()
        1.0
    """

    def update(self, scores: Tensor, indices: Tensor, effects: Tensor) -> None:
        """Add the queries of a batch."""
        self.add(_of_removals(*_single(scores, indices, effects), self.correlation))


def _grouped(scores: Tensor, groups: Tensor, effects: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted and measured effects, each [q, m], after all checks."""
    check_scores(scores)
    check_groups(groups, scores.shape[1], "groups")
    check_measured(effects, "effects", len(groups), len(scores))
    return -subset_predictions(scores, groups), effects.T.double().to(scores.device)


def _single(scores: Tensor, indices: Tensor, effects: Tensor) -> tuple[Tensor, Tensor]:
    check_scores(scores)
    check_shape(indices, "indices", ("m",))
    if indices.dtype == torch.bool or indices.is_floating_point():
        raise TypeError(
            f"`indices` must be integers [m], got {indices.dtype}; of a mask, pass `mask.nonzero()[:, 0]`."
        )
    outside = (indices < 0) | (indices >= scores.shape[1])
    if outside.any():
        raise ValueError(f"`indices` must be from 0 to {scores.shape[1] - 1}, got {indices[outside].tolist()}.")
    check_measured(effects, "effects", len(indices), len(scores))
    return -scores.double()[:, indices.to(scores.device)], effects.T.double().to(scores.device)


def _of_removals(predicted: Tensor, actual: Tensor, correlation: str) -> Tensor:
    _check_correlation(correlation)
    return CORRELATIONS[correlation](predicted, actual)


def _check_correlation(correlation: str) -> None:
    if correlation not in CORRELATIONS:
        raise ValueError(f'`correlation` must be "spearman" or "pearson", got {correlation!r}.')
