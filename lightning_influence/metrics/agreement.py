"""Whether two sets of scores put the training examples in the same order."""

from __future__ import annotations

from torch import Tensor

from lightning_influence.metrics.checks import check_shape
from lightning_influence.metrics.ranks import rank_correlations


def mean_rank_correlation(scores: Tensor, reference: Tensor) -> float:
    """Spearman's rank correlation of each query's scores with the reference's, averaged.

    Args:
        scores: shape [q, n], n >= 2.
        reference: shape [q, n].

    Returns:
        Between -1 and 1. A query whose scores are all equal in both (its gradient is zero) has no order
        and does not count, one that has in one of them only counts as 0. NaN if that leaves none, or a score
        is NaN.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(mean_rank_correlation(scores, scores.exp()), 4)
        1.0
    """
    check_shape(scores, "scores", ("q", "n"))
    check_shape(reference, "reference", tuple(scores.shape))
    if bool(scores.isnan().any() or reference.isnan().any()):
        return float("nan")
    has_order = (scores != scores[:, :1]).any(1) | (reference != reference[:, :1]).any(1)
    return float(rank_correlations(scores, reference).nan_to_num(nan=0.0)[has_order].mean())
